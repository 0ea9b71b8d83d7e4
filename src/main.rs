//! farhaven
fn main(){}
