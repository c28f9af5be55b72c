//! The programs that a check is made of, besides the test itself: this test program, started again in
//! another role. They end with the test, whose end of the line is closed then.

use super::{brokered, crowd, holder, intruder, line, takeover};

/// No test, but where those programs begin.
#[test]
#[ignore = "started by the tests of this module"]
fn program() {
    let Some(role) = line::role() else { return };
    match role.as_str() {
        holder::KERNEL => holder::hold_kernel_queue(),
        holder::BROKERED => holder::hold_brokered_queue(),
        crowd::ROLE => crowd::read(),
        brokered::ROLE => brokered::supervise(),
        intruder::ROLE => intruder::supervise(),
        intruder::INTRUDER => intruder::intrude(),
        takeover::PARENT => takeover::parent(),
        takeover::RESPONDER => takeover::respond(),
        takeover::READERS => takeover::read(),
        other => panic!("no role: {other}"),
    }
    std::process::exit(0);
}
