//! The semantics of a queue once more, as a model without a kernel; and what is done with events, for
//! the brokered queue and for the kernel's, against it, with random operations.
//!
//! A case that fails is shown in its shortest form, with the seed. What the real kernel does is checked
//! in [`conformance`](super::conformance).

mod broker;
mod kernel;

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::broker::{Death, MAX_STRIKES};
use crate::fanotify::{DenyErrno, Verdict};

/// An event, by the number of those that arrived before it.
type Name = u64;

/// Where the two queues differ.
#[derive(Debug, Clone, Copy)]
struct Rules {
    /// The event of a reader that was killed is not given out any more.
    forgets_the_dead: bool,
    /// An event with too many strikes is denied at once. Else when it is taken again.
    gives_up_at_once: bool,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    in_hand: bool,
    reader_lives: bool,
    strikes: u32,
}

/// What a queue must do. Its order is the order of arrival, whoever has had an event meanwhile.
#[derive(Debug)]
struct Model {
    rules: Rules,
    arrived: Name,
    open: bool,
    /// The events that have not been answered.
    events: BTreeMap<Name, Entry>,
    /// What readers were told.
    outcomes: BTreeMap<Name, Verdict>,
}

impl Model {
    fn new(rules: Rules) -> Self {
        let (events, outcomes) = (BTreeMap::new(), BTreeMap::new());
        Self { rules, arrived: 0, open: false, events, outcomes }
    }

    fn arrive(&mut self) -> Name {
        self.arrived += 1;
        let entry = Entry { in_hand: false, reader_lives: true, strikes: 0 };
        self.events.insert(self.arrived, entry);
        self.arrived
    }

    fn names(&self, is: impl Fn(&Entry) -> bool) -> Vec<Name> {
        self.events.iter().filter(|(_, entry)| is(entry)).map(|(name, _)| *name).collect()
    }

    fn take(&mut self, count: usize) -> Vec<Name> {
        let mut taken = Vec::new();
        for name in self.names(|entry| !entry.in_hand).into_iter().take(count) {
            let entry = self.events.get_mut(&name).unwrap();
            if entry.strikes >= MAX_STRIKES {
                self.end(name, Verdict::Deny(DenyErrno::Eio));
            } else {
                entry.in_hand = true;
                taken.push(name);
            }
        }
        taken
    }

    /// False: it is refused.
    fn answer(&mut self, name: Name, verdict: Verdict) -> bool {
        let in_hand = self.events.get(&name).is_some_and(|entry| entry.in_hand);
        if in_hand {
            self.end(name, verdict);
        }
        in_hand
    }

    fn end(&mut self, name: Name, verdict: Verdict) {
        let entry = self.events.remove(&name).unwrap();
        if entry.reader_lives {
            self.outcomes.insert(name, verdict);
        }
    }

    fn holder_ends(&mut self, death: Death) {
        self.open = false;
        for name in self.names(|entry| entry.in_hand) {
            let entry = self.events.get_mut(&name).unwrap();
            entry.in_hand = false;
            entry.strikes += u32::from(death == Death::Fault);
            if !entry.reader_lives && self.rules.forgets_the_dead {
                self.events.remove(&name);
            } else if entry.strikes >= MAX_STRIKES && self.rules.gives_up_at_once {
                self.end(name, Verdict::Deny(DenyErrno::Eio));
            }
        }
    }

    /// The next one looks at all that is left, and leaves it to the next holder.
    fn supervisor_ends(&mut self) {
        self.take(usize::MAX);
        self.holder_ends(Death::Outside);
    }

    fn reader_dies(&mut self, name: Name) {
        let entry = self.events.get_mut(&name).unwrap();
        entry.reader_lives = false;
        if !entry.in_hand && self.rules.forgets_the_dead {
            self.events.remove(&name);
        }
    }
}

/// A state machine that is to do the same.
trait Machine {
    const RULES: Rules;

    fn new() -> Self;
    fn arrive(&mut self, name: Name);
    fn open(&mut self);
    /// Gives the next events, `count` at most, to the holder.
    fn take(&mut self, count: usize) -> Vec<Name>;
    /// By the last id that the event had. False: it is refused.
    fn answer(&mut self, name: Name, verdict: Verdict) -> bool;
    fn holder_ends(&mut self, death: Death);
    fn reader_dies(&mut self, name: Name);
    /// By the administrator, or the deadline, whoever has the event. False: it can't be done now.
    fn deny(&mut self, name: Name) -> bool;
    /// By the administrator: an event in hand waits again. False: it is where it was.
    fn retry(&mut self, name: Name) -> bool;
    /// While the queue is closed, another supervisor takes over.
    fn supervisor_ends(&mut self);
    /// Told when a reader was answered.
    fn outcomes(&self) -> BTreeMap<Name, Verdict>;
    /// The books of the machine: events that wait, and that are in hand, those of the dead too.
    fn books(&self) -> (usize, usize);
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Arrive,
    Open,
    Take(usize),
    /// One that is in hand.
    Answer(usize, Verdict),
    /// One that is not: it waits, was answered, or never was.
    AnswerWrongly(usize, Verdict),
    HolderEnds(Death),
    ReaderDies(usize),
    Deny(usize),
    Retry(usize),
    /// All that are older than this one are denied.
    Deadline(usize),
    SupervisorEnds,
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        3 => Just(Verdict::Allow),
        1 => prop::sample::select(&DenyErrno::ALL[..]).prop_map(Verdict::Deny),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let n = || any::<usize>();
    prop_oneof![
        8 => Just(Op::Arrive),
        4 => Just(Op::Open),
        6 => (1_usize..6).prop_map(Op::Take),
        5 => (n(), verdict()).prop_map(|(n, verdict)| Op::Answer(n, verdict)),
        2 => (n(), verdict()).prop_map(|(n, verdict)| Op::AnswerWrongly(n, verdict)),
        2 => Just(Op::HolderEnds(Death::Outside)),
        2 => Just(Op::HolderEnds(Death::Fault)),
        2 => n().prop_map(Op::ReaderDies),
        1 => n().prop_map(Op::Deny),
        1 => n().prop_map(Op::Retry),
        1 => n().prop_map(Op::Deadline),
        1 => Just(Op::SupervisorEnds),
    ]
}

/// One operation on both.
fn apply<M: Machine>(model: &mut Model, machine: &mut M, op: Op) -> Result<(), TestCaseError> {
    let nth = |names: &[Name], n: usize| names.get(n.checked_rem(names.len())?).copied();
    match op {
        Op::Arrive => machine.arrive(model.arrive()),
        Op::Open if !model.open => {
            model.open = true;
            machine.open();
        }
        Op::Take(count) if model.open => prop_assert_eq!(machine.take(count), model.take(count)),
        Op::Answer(n, verdict) => {
            if let Some(name) = nth(&model.names(|entry| entry.in_hand), n) {
                prop_assert!(model.answer(name, verdict) && machine.answer(name, verdict));
            }
        }
        Op::AnswerWrongly(n, verdict) => {
            let not_in_hand = |name: &Name| !model.events.get(name).is_some_and(|e| e.in_hand);
            let names: Vec<_> = (0..=model.arrived).filter(not_in_hand).collect();
            let name = nth(&names, n).unwrap();
            prop_assert!(!machine.answer(name, verdict), "{} is not in hand", name);
        }
        Op::HolderEnds(death) if model.open => {
            model.holder_ends(death);
            machine.holder_ends(death);
        }
        Op::ReaderDies(n) => {
            if let Some(name) = nth(&model.names(|entry| entry.reader_lives), n) {
                model.reader_dies(name);
                machine.reader_dies(name);
            }
        }
        Op::Deny(n) => {
            if let Some(name) = nth(&model.names(|_| true), n) {
                deny(model, machine, name);
            }
        }
        Op::Retry(n) => {
            if let Some(name) = nth(&model.names(|_| true), n)
                && machine.retry(name)
            {
                model.events.get_mut(&name).unwrap().in_hand = false;
            }
        }
        Op::Deadline(n) => {
            let names = model.names(|_| true);
            let late = n.checked_rem(names.len()).unwrap_or(0);
            names.into_iter().take(late).for_each(|name| deny(model, machine, name));
        }
        Op::SupervisorEnds => {
            if model.open {
                // the worker goes with it
                model.holder_ends(Death::Outside);
                machine.holder_ends(Death::Outside);
            }
            model.supervisor_ends();
            machine.supervisor_ends();
        }
        Op::Open | Op::Take(_) | Op::HolderEnds(_) => {}
    }
    Ok(())
}

fn deny<M: Machine>(model: &mut Model, machine: &mut M, name: Name) {
    if machine.deny(name) {
        model.end(name, Verdict::Deny(DenyErrno::Eio));
    }
}

fn agree<M: Machine>(model: &Model, machine: &M) -> Result<(), TestCaseError> {
    prop_assert_eq!(&machine.outcomes(), &model.outcomes);
    let waiting = model.names(|entry| !entry.in_hand).len();
    prop_assert_eq!(machine.books(), (waiting, model.events.len() - waiting));
    Ok(())
}

/// Both do the same at each step. In the end nobody is left waiting.
fn run<M: Machine>(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let (mut model, mut machine) = (Model::new(M::RULES), M::new());
    for op in ops {
        apply(&mut model, &mut machine, op)?;
        agree(&model, &machine)?;
    }
    apply(&mut model, &mut machine, Op::Open)?;
    while !model.events.is_empty() {
        apply(&mut model, &mut machine, Op::Take(usize::MAX))?;
        for _ in 0..model.events.len() {
            apply(&mut model, &mut machine, Op::Answer(0, Verdict::Allow))?;
        }
        agree(&model, &machine)?;
    }
    Ok(())
}

/// Random operations, the same in each run. `HYDRANT_MODEL_SEED` gives others.
fn check<M: Machine>() {
    let seed = std::env::var("HYDRANT_MODEL_SEED").map_or(1, |seed| seed.parse().unwrap());
    let rng_seed = RngSeed::Fixed(seed);
    let config = Config { cases: 512, rng_seed, failure_persistence: None, ..Config::default() };
    let ops = prop::collection::vec(op(), 1..200);
    let result = TestRunner::new(config).run(&ops, run::<M>);
    result.unwrap_or_else(|error| panic!("HYDRANT_MODEL_SEED={seed}: {error}"));
}

#[test]
fn the_broker() {
    check::<broker::BrokerMachine>();
}

#[test]
fn the_kernels_queue() {
    check::<kernel::KernelMachine>();
}
