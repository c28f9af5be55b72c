//! Each test starts this test program anew, enters the sandbox there, and has it try something.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::*;

const UID: u32 = 64_997;
const ACTION: &str = "HYDRANT_TEST_SANDBOX";
const ARGUMENT: &str = "HYDRANT_TEST_ARGUMENT";

/// In the child: what it does in the sandbox. `Err` ends it with status 1.
fn act(action: &str, argument: &str) -> Result<String, Box<dyn std::error::Error>> {
    let spool = fs_err::File::open(std::env::temp_dir()).ok();
    let spool =
        if action.starts_with("spool") { Some(fs_err::File::open(argument)?) } else { spool };
    let spec = SandboxSpec {
        uid: UID,
        gid: UID,
        spool_dir: spool.as_ref().filter(|_| action.starts_with("spool")).map(AsFd::as_fd),
        readable: Vec::new(),
        event_files: None,
        without_landlock: false,
    };
    enter(&spec)?;
    match action {
        "wait" => {
            println!("in");
            std::io::stdin().read_line(&mut String::new())?;
            Ok(String::new())
        }
        "open" => Ok(fs_err::read(argument)?.len().to_string()),
        "exec" => Err(std::os::unix::process::CommandExt::exec(&mut Command::new(argument)).into()),
        "spawn" => Ok(Command::new(argument).status()?.to_string()),
        "call" => {
            let number: libc::c_long = argument.parse()?;
            crate::sys::test_support::call(number)?;
            Ok(String::new())
        }
        "socket" => {
            let (family, kind, protocol) = match argument {
                "packet" => (libc::AF_PACKET, libc::SOCK_DGRAM, 0),
                "audit" => (libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_AUDIT),
                "raw" => (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
                "vsock" => (libc::AF_VSOCK, libc::SOCK_STREAM, 0),
                "route" => {
                    (libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE)
                }
                _ => (libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0),
            };
            crate::sys::test_support::socket(family, kind, protocol)?;
            Ok(String::new())
        }
        "resolve" => Ok(argument.to_socket_addrs()?.map(|a| a.ip().to_string() + " ").collect()),
        "connect" => {
            let mut stream = TcpStream::connect(argument)?;
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        }
        "listen" => Ok(format!("{:?}", TcpListener::bind("127.0.0.1:0")?)),
        "spool" => {
            use nix::fcntl::{OFlag, openat};
            let directory = spool.as_ref().ok_or("no spool")?;
            let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            let fd = openat(directory, ".", flags, nix::sys::stat::Mode::from_bits_retain(0o600))?;
            let file = std::fs::File::from(fd);
            use std::os::unix::fs::FileExt;
            file.write_all_at(b"spooled", 4096)?;
            nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20)?;
            let mut bytes = [0; 7];
            file.read_exact_at(&mut bytes, 4096)?;
            file.set_len(100)?;
            file.sync_all()?;
            Ok(String::from_utf8(bytes.into())?)
        }
        "spool-elsewhere" => {
            let outside = std::path::Path::new(argument).with_extension("elsewhere");
            fs_err::write(outside.join("file"), "x")?;
            Ok(String::new())
        }
        "tokio" => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(3)
                .enable_all()
                .build()?;
            runtime.block_on(async {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let mut tasks = Vec::new();
                for _ in 0..8 {
                    let address = argument.to_owned();
                    tasks.push(tokio::spawn(async move {
                        let mut stream = tokio::net::TcpStream::connect(address).await?;
                        stream.write_all(b"hello").await?;
                        stream.shutdown().await?;
                        let mut text = String::new();
                        stream.read_to_string(&mut text).await?;
                        Ok::<_, std::io::Error>(text.len())
                    }));
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
                let mut signal =
                    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
                nix::sys::signal::raise(nix::sys::signal::SIGTERM)?;
                signal.recv().await.ok_or("no signal")?;
                let sum = tokio::task::spawn_blocking(|| (0..1000u64).sum::<u64>()).await?;
                let hosts = tokio::net::lookup_host(("localhost", 80)).await?.count();
                let mut length = 0;
                for task in tasks {
                    length += task.await??;
                }
                Ok(format!("{length} {sum} {}", hosts > 0))
            })
        }
        "panic" => Ok(format!("{}", std::panic::catch_unwind(|| panic!("on purpose")).is_err())),
        "abort" => std::process::abort(),
        _ => Err("no such action".into()),
    }
}

/// Not a test: the child's side of the others, a process with one thread.
#[test]
#[ignore = "needs root"]
fn root_child() {
    let Ok(action) = std::env::var(ACTION) else { return };
    let argument = std::env::var(ARGUMENT).unwrap_or_default();
    crate::sys::test_support::in_single_thread(|| match act(&action, &argument) {
        Ok(text) => {
            println!("ok {text}");
            0
        }
        Err(error) => {
            println!("error {}", chain(error.as_ref()));
            1
        }
    });
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn child(action: &str, argument: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "worker::sandbox::tests::root_child",
            "--include-ignored",
            "--nocapture",
            "-q",
        ])
        .env(ACTION, action)
        .env(ARGUMENT, argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What the child said, and how it ended: the harness around it passes the status on.
fn run(action: &str, argument: &str) -> (String, ExitStatus) {
    let mut child = child(action, argument);
    let mut output = child.stdout.take().unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{action} {argument} takes too long");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    let said = text.lines().find(|line| line.starts_with("ok") || line.starts_with("error"));
    (said.unwrap_or_default().to_owned(), status)
}

#[track_caller]
fn assert_ok(action: &str, argument: &str, expected: &str) {
    let (said, status) = run(action, argument);
    assert_eq!((said.trim_end(), status.code()), (format!("ok {expected}").trim_end(), Some(0)));
}

#[track_caller]
fn assert_error(action: &str, argument: &str, expected: &str) {
    let (said, _) = run(action, argument);
    assert!(said.starts_with("error ") && said.contains(expected), "{said}");
}

#[track_caller]
fn assert_killed(action: &str, argument: &str) {
    let (said, status) = run(action, argument);
    assert_eq!((said.as_str(), status.signal()), ("", Some(libc::SIGSYS)), "{action} {argument}");
}

/// An echo server on loopback, for as long as the test runs.
fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            stream.write_all(&text).unwrap();
        }
    });
    address
}

#[test]
#[ignore = "needs root"]
fn root_nothing_is_left_of_roots_rights() {
    let mut child = child("wait", "");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let found = lines.by_ref().map(Result::unwrap).find(|line| line.ends_with("in"));
    assert!(found.is_some(), "it did not get in");
    // The process in the sandbox is the harness's child.
    let task = format!("/proc/{0}/task", child.id());
    let inside: u32 = fs_err::read_dir(task)
        .unwrap()
        .find_map(|task| {
            let children = fs_err::read_to_string(task.unwrap().path().join("children")).unwrap();
            children.trim().parse().ok()
        })
        .unwrap();
    let status = fs_err::read_to_string(format!("/proc/{inside}/status")).unwrap();
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("Uid:"), [UID.to_string().as_str(); 4].join(" "));
    assert_eq!(line("Gid:"), [UID.to_string().as_str(); 4].join(" "));
    assert_eq!(line("Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(line(set), "0000000000000000", "{set}");
    }
    assert_eq!((line("NoNewPrivs:"), line("Seccomp:")), ("1".into(), "2".into()));
    assert_eq!(line("Seccomp_filters:"), "3");
    // Not dumpable: its /proc files are root's.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs_err::metadata(format!("/proc/{inside}/environ")).unwrap().uid(), 0);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
#[ignore = "needs root"]
fn root_files_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    fs_err::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // Readable for the world, as far as permissions go: it is Landlock that keeps it away.
    let catalog = directory.path().join("catalog.sqlite");
    fs_err::write(&catalog, "secret").unwrap();
    fs_err::set_permissions(&catalog, PermissionsExt::from_mode(0o666)).unwrap();
    assert_error("open", catalog.to_str().unwrap(), "Permission denied");
    assert_error("open", "/etc/shadow", "Permission denied");
    assert_error("open", "/proc/self/environ", "Permission denied");
    assert_error("open", "/proc/1/status", "Permission denied");
    assert_ok("open", "/etc/hosts", &fs_err::metadata("/etc/hosts").unwrap().len().to_string());
}

#[test]
#[ignore = "needs root"]
fn root_forbidden_calls_end_the_process_or_fail() {
    assert_killed("exec", "/bin/true");
    assert_error("spawn", "/bin/true", "Operation not permitted");
    for call in DEADLY_SAMPLES {
        assert_killed("call", &call.to_string());
    }
    for call in [
        libc::SYS_io_uring_setup,
        libc::SYS_fork,
        libc::SYS_setuid,
        libc::SYS_memfd_create,
        libc::SYS_kill,
    ] {
        assert_error("call", &call.to_string(), "Operation not permitted");
    }
}

const DEADLY_SAMPLES: [libc::c_long; 7] = [
    libc::SYS_ptrace,
    libc::SYS_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_bpf,
    libc::SYS_unshare,
    libc::SYS_pidfd_getfd,
];

#[test]
#[ignore = "needs root"]
fn root_sockets_are_for_the_internet_and_the_resolver() {
    for kind in ["packet", "audit", "raw", "vsock"] {
        assert_error("socket", kind, "Operation not permitted");
    }
    assert_ok("socket", "route", "");
    assert_ok("socket", "udp6", "");
    assert_ok("connect", &echo(), "hello");
    assert_error("listen", "", "");
}

#[test]
#[ignore = "needs root"]
fn root_names_are_resolved() {
    let (said, _) = run("resolve", "localhost:80");
    assert!(said.contains("127.0.0.1") || said.contains("::1"), "{said}");
    // By DNS, where the answer must be "no" or a try again, not a crash.
    let (_, status) = run("resolve", "no-such-host.invalid:80");
    assert_eq!(status.code(), Some(1));
}

#[test]
#[ignore = "needs root"]
fn root_files_are_made_in_the_spool_and_nowhere_else() {
    let directory = tempfile::tempdir().unwrap();
    let spool = directory.path().join("spool");
    let elsewhere = directory.path().join("spool.elsewhere");
    for path in [&spool, &elsewhere] {
        fs_err::create_dir(path).unwrap();
        fs_err::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    fs_err::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    assert_ok("spool", spool.to_str().unwrap(), "spooled");
    assert_error("spool-elsewhere", spool.to_str().unwrap(), "Permission denied");
}

#[test]
#[ignore = "needs root"]
fn root_a_runtime_with_threads_works() {
    assert_ok("tokio", &echo(), "40 499500 true");
    assert_ok("panic", "", "true");
    let (_, status) = run("abort", "");
    assert_eq!(status.signal(), Some(libc::SIGABRT));
}

#[test]
fn a_process_with_threads_is_refused() {
    // The harness has one thread for itself and one for this test.
    let spec = SandboxSpec {
        uid: UID,
        gid: UID,
        spool_dir: None,
        readable: vec![],
        event_files: None,
        without_landlock: false,
    };
    assert!(matches!(enter(&spec), Err(SandboxError::Threads(2..))));
}

#[test]
fn the_unused_user_is_nobodys() {
    let (uid, gid) = unused_uid().unwrap();
    assert!(uid > 0 && gid > 0);
    if let Some(user) = User::from_uid(Uid::from_raw(uid)).unwrap() {
        assert_eq!(user.name, USER);
    }
}
