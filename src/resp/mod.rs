//! The wire: requests from clients ([`request`]), replies to them ([`reply`]).
pub mod reply;
pub mod request;
