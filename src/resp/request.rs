//! One client: bytes in, requests out.
