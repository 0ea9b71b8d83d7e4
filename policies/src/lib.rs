//! farhaven
