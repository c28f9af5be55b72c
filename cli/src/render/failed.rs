//! Events that were given up.

use hydrant_api::FailedEvent;

use super::{or_dash, table, time};
use crate::output::clean_line;

/// One line each, then how their workers ended. `now`: in milliseconds since the epoch.
pub fn failed(events: &[FailedEvent], now: u64) -> String {
    if events.is_empty() {
        return "nothing was given up\n".into();
    }
    let row = |event: &FailedEvent| {
        vec![
            event.id.to_string(),
            format!("{} ago", time(now.saturating_sub(event.time_ms))),
            state(event),
            event.attempts.to_string(),
            event.process.pid.to_string(),
            or_dash(event.process.comm.as_ref()),
            or_dash(event.directory.as_ref()),
            or_dash(event.path.as_ref()),
            event.segment.to_string(),
            format!("{}+{}", event.offset, event.count),
        ]
    };
    let headings = [
        ">ID",
        ">GIVEN UP",
        "STATE",
        ">TRIES",
        ">PID",
        "COMMAND",
        "TREE",
        "PATH",
        ">SEGMENT",
        "RANGE",
    ];
    let mut text = table(&headings, events.iter().map(row));
    for event in events {
        let ends: Vec<String> = event.deaths.iter().map(|death| clean_line(death)).collect();
        let ends = if ends.is_empty() { "not known".into() } else { ends.join("; ") };
        text.push_str(&format!("{}: its workers' ends: {ends}\n", event.id));
    }
    text
}

fn state(event: &FailedEvent) -> String {
    match (event.state.as_str(), event.retry_in_ms) {
        ("quarantined", Some(left)) => format!("quarantined for {}", time(left / 1000 * 1000)),
        ("on_trial", _) => "may be tried".into(),
        (state, _) => state.replace('_', " "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;

    #[test]
    fn what_was_given_up() {
        let event = samples::failed();
        let settled =
            hydrant_api::FailedEvent { state: "settled".into(), deaths: vec![], ..event.clone() };
        let now = event.time_ms + 12_000;
        assert_eq!(
            super::failed(&[event, settled], now),
            "\
ID     GIVEN UP  STATE                    TRIES  PID  COMMAND  TREE         PATH              SEGMENT  RANGE
 7  12.00 s ago  quarantined for 48.00 s      3  812  make     /srv/u-boot  common/board_f.c        5  4096+8192
 7  12.00 s ago  settled                      3  812  make     /srv/u-boot  common/board_f.c        5  4096+8192
7: its workers' ends: signal: 11 (SIGSEGV); signal: 11 (SIGSEGV); signal: 11 (SIGSEGV)
7: its workers' ends: not known
"
        );
        assert_eq!(super::failed(&[], now), "nothing was given up\n");
    }
}
