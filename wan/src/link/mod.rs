//! quinn's side of the controller.
#[allow(dead_code, reason = "the session's link makes connections with it")]
mod control;
