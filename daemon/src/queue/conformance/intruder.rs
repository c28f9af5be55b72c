//! A worker that was taken over, and asks for what is not its own.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::unistd::{getgid, getuid};

use super::BLOCKS;
use super::brokered::{DIRECTORY, POOL, guard, prepare, state};
use super::holder::introduce;
use super::line::{self, Line, Lines};
use crate::fanotify::testing::{LIMIT, directory, readable};
use crate::ids::PoolId;
use crate::queue::wire::{self, Credential, FromWorker, ToWorker};
use crate::supervisor::git::{Git, Remote};
use crate::supervisor::origins::{Access, GitAccess, Origins};
use crate::sys::seqpacket;
use crate::sys::spawn::{Spawn, inherited};
use crate::sys::user::User;

/// The supervisor, and in the worker's place the intruder.
pub(super) const ROLE: &str = "supervisor of an intruder";
pub(super) const INTRUDER: &str = "intruder";
const REPORTS: &str = "intruder";

/// Of another shard.
const OTHERS: PoolId = PoolId(2);
const UNKNOWN: PoolId = PoolId(3);

/// What is asked for, and whether it is to be had.
const CREDENTIALS: [(PoolId, &str, bool); 9] = [
    (POOL, "https://h/x.git", true),
    (POOL, "https://h/y/z", true),
    (POOL, "https://other/x.git", false),
    (POOL, "http://h/x.git", false),
    (POOL, "https://h:8443/x.git", false),
    (POOL, "https://h.example.org/x.git", false),
    (OTHERS, "https://other/x.git", false),
    (OTHERS, "https://h/x.git", false),
    (UNKNOWN, "https://h/x.git", false),
];
const TRANSPORTS: [PoolId; 2] = [OTHERS, UNKNOWN];

type Answer = (Result<Option<Credential>, String>, usize);

/// It gets the credentials of the pools of its own shard, for their own hosts, and neither credentials
/// nor connections of any others.
#[test]
#[ignore = "needs root"]
fn root_an_intruder_gets_what_is_its_pools() {
    let directory = directory();
    prepare(directory.path(), BLOCKS);
    let reports = Lines::new(directory.path(), REPORTS);
    let supervisors = Lines::new(directory.path(), "supervisor");
    let program = line::program(ROLE, supervisors.path()).variable(DIRECTORY, directory.path());
    let (_supervisor, _line) = supervisors.start(program);
    let mut report = reports.accept();
    for (pool, url, granted) in CREDENTIALS {
        let (answer, fds): Answer = report.recv().expect("the intruder lives");
        let what = format!("pool {pool}, {url}: {answer:?}");
        assert_eq!(fds, 0, "{what}");
        if granted {
            let Credential { username, password } = answer.unwrap().expect("there is one");
            assert_eq!((&username[..], &password[..]), ("me", "secret"), "{what}");
        } else {
            assert!(answer.is_err_and(|why| why.contains("pool")), "{what}");
        }
    }
    for pool in TRANSPORTS {
        let (answer, fds): Answer = report.recv().expect("the intruder lives");
        assert!(answer.is_err() && fds == 0, "pool {pool}: {answer:?}");
    }
}

/// The program.
pub(super) fn supervise() {
    let mut line = Line::connect();
    let origins = Origins::default();
    let helper = "!f() { echo username=me; echo password=secret; }; f";
    let environment = [
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_CONFIG_COUNT", "1"),
        ("GIT_CONFIG_KEY_0", "credential.helper"),
        ("GIT_CONFIG_VALUE_0", helper),
    ];
    let git = Git {
        user: User::lookup(getuid().as_raw(), getgid().as_raw()).unwrap(),
        environment: environment.map(|(name, value)| (name.into(), value.into())).into(),
        directory: state(),
    };
    for (pool, url) in [(POOL, "https://h/x.git"), (OTHERS, "https://other/x.git")] {
        let (url, remote) = (url.to_owned(), Remote::Http(url.into()));
        origins.insert(pool, Access::Git(GitAccess::new(url, remote, git.clone())));
    }
    let _shard = guard(None, Arc::new(origins), worker);
    let _: Option<()> = line.recv();
}

fn worker() -> Spawn {
    line::program(INTRUDER, &state().join(REPORTS))
}

/// The program in the worker's place: asks one thing after the other and reports the answers.
pub(super) fn intrude() {
    let [control, _queue, _spool] = inherited().unwrap();
    introduce(&control);
    let mut line = Line::connect();
    let credentials = CREDENTIALS.iter().zip(0..).map(|((pool, url, _), request)| {
        let (pool, url) = (*pool, (*url).to_owned());
        FromWorker::NeedCredential { request, pool, url, rejected: None }
    });
    let transports = TRANSPORTS.iter().zip(100..);
    let transports =
        transports.map(|(pool, request)| FromWorker::NeedTransport { request, pool: *pool });
    let mut buffer = vec![0; wire::MAX_MESSAGE];
    for question in credentials.chain(transports) {
        seqpacket::send(control.as_fd(), &wire::encode(&question).unwrap(), &[]).unwrap();
        assert!(readable(&control, LIMIT), "the supervisor does not answer");
        let received = seqpacket::receive(control.as_fd(), &mut buffer).unwrap().unwrap();
        let answer = match wire::decode(&buffer[..received.length]).unwrap() {
            ToWorker::Credential { result, .. } => result,
            ToWorker::Transport { result, .. } => result.map(|()| None),
            other => panic!("{other:?}"),
        };
        line.send(&(answer, received.fds.len()));
    }
    let _: Option<()> = line.recv();
}
