//! Bytes that come in for a request: who waits for it waits on, and is told.

use std::time::Duration;

use super::timers::Timer;
use super::{Effect, LONGEST_WAIT, Lane, Now, RequestId, Schedule, State, Waiter};
use crate::fanotify::DenyErrno;
use crate::ids::EventId;
use crate::worker::ObjectNo;

/// How often it is told that bytes come in.
const SAY: Duration = Duration::from_secs(3);
/// After so many failures the bytes of an object are no progress: an origin that breaks off each
/// time would keep its readers as long as one that is slow.
const BROKEN_OFF: u32 = 3;

impl Schedule {
    /// So many bytes have come for this request since its start.
    pub fn progress(&mut self, now: Now, request: RequestId, received: u64) {
        let Self { requests, objects, waits, demand, effects, .. } = self;
        let Some(running) = requests.get_mut(&request) else { return };
        if received <= running.received {
            return;
        }
        running.received = received;
        let come = format!("{} have come, for {} of content", size(received), size(running.size));
        let of_this = |no: &&ObjectNo| {
            objects.get(no).is_some_and(|object| object.requests.contains(&request))
        };
        let queued = |no: &&ObjectNo| {
            objects.get(no).is_some_and(|object| object.state == State::Queued(Lane::Demand))
        };
        let coming = running.objects.iter().filter(of_this).map(|no| (no, come.as_str()));
        // Their turn comes after this request.
        let in_line = demand.iter().map(|(no, _)| no).filter(queued);
        let in_line = in_line.map(|no| (no, "in line behind what the origin is sending"));
        for (no, reason) in coming.chain(in_line) {
            let Some(object) = objects.get(no) else { continue };
            if object.tries + object.wrong >= BROKEN_OFF {
                continue;
            }
            for waiter in &object.waiters {
                let Waiter::Event(event) = *waiter else { continue };
                let Some(wait) = waits.get_mut(waiter) else { continue };
                wait.heard = now;
                if now.saturating_sub(wait.said) >= SAY {
                    wait.said = now;
                    wait.reason = Some(reason.to_owned());
                    effects.push(Effect::Waiting { event, reason: reason.to_owned() });
                }
            }
        }
    }

    /// An event's deadline has come, unless there was progress since it was set.
    pub(super) fn deadline(&mut self, now: Now, event: EventId) {
        let waiter = Waiter::Event(event);
        let Some(wait) = self.waits.get(&waiter) else { return };
        let longest = wait.began + LONGEST_WAIT.max(self.deadline);
        let until = (wait.heard + self.deadline).min(longest);
        if until > now {
            return self.timers.set(until, Timer::Deadline(event));
        }
        let waited = until.saturating_sub(wait.began).as_secs();
        let reason = wait.reason.as_deref().unwrap_or("the origin has not answered");
        let reason = format!("gave up after {waited} s: {reason}");
        self.waits.remove(&waiter);
        self.effects.push(Effect::Fail { waiter, errno: DenyErrno::Eio, reason });
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} bytes"),
        10_000..10_000_000 => format!("{} kB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}
