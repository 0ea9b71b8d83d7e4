//! quinn's side of the controller.
mod control;
