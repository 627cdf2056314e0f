//! The wire: requests from clients ([`request`]), replies to them ([`reply`]), and where a backend's reply ends ([`scan`]).
pub mod cut;
pub mod reply;
pub mod request;
pub mod scan;
