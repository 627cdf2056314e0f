//! The wire: requests from clients ([`request`]), replies to them ([`reply`]), where a backend's reply ends ([`scan`]), and
//! the patterns that commands take ([`glob`]).
pub mod cut;
pub mod glob;
pub mod reply;
pub mod request;
pub mod scan;
