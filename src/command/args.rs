//! Checked arguments.
pub struct Args;
