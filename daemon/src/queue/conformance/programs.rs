//! The programs that a check is made of, besides the test itself: this test program, started again in
//! another role. They end with the test, whose end of the line is closed then.

use super::{brokered, crowd, holder, line};

/// No test, but where those programs begin.
#[test]
#[ignore = "started by the tests of this module"]
fn program() {
    let Some((role, line)) = line::role() else { return };
    match role.as_str() {
        holder::KERNEL => holder::hold_kernel_queue(line),
        holder::BROKERED => holder::hold_brokered_queue(line),
        crowd::ROLE => crowd::read(line),
        brokered::ROLE => brokered::supervise(line),
        other => panic!("no role: {other}"),
    }
    std::process::exit(0);
}
