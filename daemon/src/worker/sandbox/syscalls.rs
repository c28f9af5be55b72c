//! The system calls that a sandboxed process may make (seccomp(2)).
//!
//! Three filters; the kernel asks all and takes the strictest answer:
//! 1. what only an intruder would call ends the process;
//! 2. `clone3` fails with `ENOSYS`, which makes glibc use `clone`, whose flags a filter can see;
//! 3. what is allowed; all else fails with `EPERM`, so that a library that only tries something goes
//!    on. The last, for it does not let another filter be installed.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword,
    SeccompCmpOp, SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// The filters, in the order in which they are to be installed.
pub fn filters() -> Result<Vec<BpfProgram>, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let errno = |number: i32| SeccompAction::Errno(number.unsigned_abs());
    let always = |calls: &[c_long]| calls.iter().map(|call| (*call, Vec::new())).collect::<Rules>();
    let table = [
        (always(DEADLY), SeccompAction::Allow, SeccompAction::KillProcess),
        (always(&[libc::SYS_clone3]), SeccompAction::Allow, errno(libc::ENOSYS)),
        (allowed()?, errno(libc::EPERM), SeccompAction::Allow),
    ];
    table
        .into_iter()
        .map(|(rules, otherwise, matching)| {
            SeccompFilter::new(rules, otherwise, matching, arch)?.try_into()
        })
        .collect()
}

/// Without conditions on the arguments.
const ALLOWED: &[c_long] = &[
    // Files and sockets that are open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    libc::SYS_lseek, // SEEK_DATA and SEEK_HOLE: what is present of a segment
    libc::SYS_fallocate,
    libc::SYS_ftruncate, // of spool files; segments are never truncated
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range, // std::io::copy tries these three in turn
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    // Opening; what, is Landlock's business.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_unlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64, // the directory of CA certificates
    libc::SYS_getcwd,
    // Memory. mmap and mprotect have rules below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Sockets. socket and socketpair have rules below; listen and accept are not needed.
    libc::SYS_connect,
    libc::SYS_bind, // getaddrinfo binds its netlink socket; TCP ports are Landlock's business
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg, // glibc's resolver sends the A and AAAA queries together
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    // tokio: reactor, wake-ups, timers.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_ppoll, // also std, at the start and in UnixStream::connect
    libc::SYS_pselect6,
    // Threads. clone has a rule below.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity, // std::thread::available_parallelism
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_clone3, // fails with ENOSYS by the second filter
    // Signals: tokio's handlers, the alternate stacks of std's threads, abort().
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall, // the kernel's own, after SIGSTOP in a sleep
    // Time and chance. The clocks come here only where the vDSO can't tell.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // Who and where we are.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,   // gethostname(), for the resolver's default domain
    libc::SYS_sysinfo, // glibc's qsort() asks how much memory there is
    libc::SYS_getrusage,
    libc::SYS_times,
];

/// The same by their old names, which arm64 does not have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_unlink,
    libc::SYS_readlink,
    libc::SYS_dup2,
    libc::SYS_poll, // the resolver waits for its answers with it
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_getrlimit,
    libc::SYS_arch_prctl, // the thread-local storage of a new thread, in some versions of glibc
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[c_long] = &[];

/// Nothing of ours calls these in a sandbox, not even to see whether it may.
const DEADLY: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_personality,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
];

fn allowed() -> Result<Rules, BackendError> {
    let mut rules: Rules =
        ALLOWED.iter().chain(ALLOWED_OLD).map(|call| (*call, Vec::new())).collect();
    // Each line is one way in which the call is allowed: (argument, comparison, value), all of them.
    let mut allow = |call: c_long, ways: &[&[Condition]]| -> Result<(), BackendError> {
        for way in ways {
            let way = way.iter().map(|condition| condition.build()).collect::<Result<_, _>>()?;
            rules.entry(call).or_default().push(SeccompRule::new(way)?);
        }
        Ok(())
    };

    // The resolver: UDP and TCP, netlink for the machine's own addresses, nscd and systemd-resolved by
    // Unix sockets. Netlink only for routes, not audit, netfilter or the like.
    allow(
        libc::SYS_socket,
        &[
            &[number(0, libc::AF_INET), socket_type(libc::SOCK_STREAM)],
            &[number(0, libc::AF_INET), socket_type(libc::SOCK_DGRAM)],
            &[number(0, libc::AF_INET6), socket_type(libc::SOCK_STREAM)],
            &[number(0, libc::AF_INET6), socket_type(libc::SOCK_DGRAM)],
            &[number(0, libc::AF_UNIX)],
            &[number(0, libc::AF_NETLINK), number(2, libc::NETLINK_ROUTE)],
        ],
    )?;
    // tokio's signal handling.
    allow(libc::SYS_socketpair, &[&[number(0, libc::AF_UNIX)]])?;

    // New threads, not processes and not namespaces.
    let thread = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_FILES;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let mask = u64::from((thread | namespaces) as u32);
    allow(libc::SYS_clone, &[&[(0, Dword, MaskedEq(mask), thread as u64).into()]])?;

    // Code comes from files that the loader maps (name service modules), never from memory that was
    // written.
    let without = |bit: i32| Condition::from((2, Dword, MaskedEq(bit as u64), 0));
    allow(libc::SYS_mmap, &[&[without(libc::PROT_EXEC)], &[without(libc::PROT_WRITE)]])?;
    allow(libc::SYS_mprotect, &[&[without(libc::PROT_EXEC)]])?;

    // The limits are read (the size of a stack), not set.
    allow(libc::SYS_prlimit64, &[&[(2, Qword, Eq, 0).into()]])?;

    // abort() and panics: signals to ourselves.
    allow(libc::SYS_tgkill, &[&[number(0, nix::unistd::getpid().as_raw())]])?;

    // Names of threads and of memory areas (glibc's malloc).
    allow(
        libc::SYS_prctl,
        &[
            &[number(0, libc::PR_SET_NAME)],
            &[number(0, libc::PR_GET_NAME)],
            &[number(0, PR_SET_VMA)],
        ],
    )?;

    allow(
        libc::SYS_ioctl,
        &[
            &[request(libc::FIONBIO)],  // std's set_nonblocking
            &[request(libc::FIOCLEX)],  // std's set_cloexec
            &[request(libc::FIONREAD)], // glibc's resolver, for the size of an answer
            &[request(libc::TCGETS)],   // is stderr a terminal?
        ],
    )?;
    Ok(rules)
}

/// `include/uapi/linux/prctl.h`
const PR_SET_VMA: i32 = 0x5356_4d41;

/// A comparison of one argument.
#[derive(Clone)]
struct Condition(u8, seccompiler::SeccompCmpArgLen, SeccompCmpOp, u64);

impl From<(u8, seccompiler::SeccompCmpArgLen, SeccompCmpOp, u64)> for Condition {
    fn from(
        (argument, width, operator, value): (u8, seccompiler::SeccompCmpArgLen, SeccompCmpOp, u64),
    ) -> Self {
        Self(argument, width, operator, value)
    }
}

impl Condition {
    fn build(&self) -> Result<SeccompCondition, BackendError> {
        SeccompCondition::new(self.0, self.1.clone(), self.2.clone(), self.3)
    }
}

fn number(argument: u8, value: i32) -> Condition {
    Condition(argument, Dword, Eq, u64::from(value as u32))
}

/// The type of a socket, whatever its flags (`SOCK_TYPE_MASK` in `include/linux/net.h`).
fn socket_type(value: i32) -> Condition {
    Condition(1, Dword, MaskedEq(0xf), u64::from(value as u32))
}

fn request(value: libc::Ioctl) -> Condition {
    Condition(1, Dword, Eq, u64::from(value as u32))
}
