//! What the tests of rendering show.

use hydrant_api::{
    Counters, FailedEvent, Mount, Owner, Process, QueueEvent, Shard, Status, WorkerDeath,
};

pub fn mount() -> Mount {
    Mount {
        directory: "/srv/u-boot".into(),
        url: "https://example.org/u-boot.git".into(),
        revision: "main".into(),
        commit: "1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d".into(),
        owner: Owner { uid: 1000, gid: 100 },
        read_only: false,
        mounted: true,
        files: 38512,
        tree_bytes: 264 << 20,
        present_bytes: 3 << 20,
        segment_bytes: 300 << 20,
        segments: 5,
        complete_segments: 1,
        pool: 1,
        shard: 0,
        history: "fetching".into(),
        trouble: None,
    }
}

pub fn other_mount() -> Mount {
    Mount {
        directory: r"/home/a/with \xff".into(),
        url: "/srv/git/a.git".into(),
        revision: "v1.0".into(),
        read_only: true,
        mounted: false,
        files: 3,
        tree_bytes: 10,
        present_bytes: 12288,
        segment_bytes: 12288,
        segments: 1,
        pool: 2,
        shard: 1,
        history: "shallow".into(),
        trouble: Some("connection refused".into()),
        ..mount()
    }
}

pub fn status() -> Status {
    let shard = Shard {
        shard: 0,
        worker_pid: Some(4711),
        worker_deaths: 1,
        last_death: Some(WorkerDeath {
            pid: 4690,
            ago_ms: 125_000,
            end: "killed by the kernel: out of memory (limit 512 MiB)".into(),
        }),
        waiting: 2,
        in_flight: 12,
        longest_wait_ms: 812,
    };
    Status {
        version: "0.1.0".into(),
        instance: 1,
        pid: 4700,
        state_dir: "/var/lib/hydrant".into(),
        run_dir: "/run/hydrant".into(),
        queue: "brokered".into(),
        mounts: vec![mount(), other_mount()],
        shards: vec![
            shard.clone(),
            Shard { shard: 1, worker_pid: None, last_death: None, ..shard },
        ],
        layers: Vec::new(),
        counters: Counters {
            events: 12345,
            answered_present: 345,
            answered_fetched: 11985,
            denied: 1,
            requeued: 2,
            waiting: 14,
            longest_wait_ms: 1240,
            requests: 321,
            retries: 3,
            objects: 11000,
            read_ahead_objects: 9000,
            content_bytes: 200 << 20,
            received_bytes: 50 << 20,
            sent_bytes: 1 << 20,
            rejected_objects: 0,
        },
    }
}

pub fn event() -> QueueEvent {
    QueueEvent {
        id: 7,
        state: "in_flight".into(),
        age_ms: 1240,
        directory: Some("/srv/u-boot".into()),
        path: Some("common/board_f.c".into()),
        layer: None,
        images: Vec::new(),
        segment: 5,
        offset: 4096,
        count: 8192,
        process: Process {
            pid: 812,
            comm: Some("make".into()),
            uid: Some(1000),
            cgroup: Some("/user.slice/a.scope".into()),
            container: None,
        },
        shard: 0,
        worker_pid: Some(4711),
        attempts: 2,
        origin: Some("https://example.org/u-boot.git".into()),
        reason: Some("connection refused, trying again".into()),
    }
}

/// In a container.
pub fn event_of_image() -> QueueEvent {
    let id = "0123456789ab".repeat(6);
    let container = id.get(..64).map(str::to_owned);
    QueueEvent {
        id: 14,
        directory: None,
        path: Some("usr/bin/python3".into()),
        layer: Some(format!("sha256:{}", "fedcba987654".repeat(6))),
        images: vec!["docker.io/library/a:1".into(), "docker.io/library/b:1".into()],
        process: Process {
            cgroup: Some("/docker/x".into()),
            comm: Some("sh".into()),
            container,
            ..event().process
        },
        origin: Some("oci://docker.io/library/a".into()),
        reason: None,
        ..event()
    }
}

pub fn failed() -> FailedEvent {
    let QueueEvent { id, directory, path, segment, offset, count, process, shard, origin, .. } =
        event();
    FailedEvent {
        id,
        time_ms: 1_750_000_000_000,
        state: "quarantined".into(),
        retry_in_ms: Some(48_000),
        times: 1,
        directory,
        path,
        segment,
        offset,
        count,
        process,
        shard,
        attempts: 3,
        origin,
        deaths: vec!["signal: 11 (SIGSEGV)".into(); 3],
    }
}

pub fn bare_event() -> QueueEvent {
    QueueEvent {
        id: 12,
        state: "waiting".into(),
        age_ms: 5,
        directory: None,
        path: None,
        process: Process { pid: 900, ..Process::default() },
        worker_pid: None,
        attempts: 0,
        origin: None,
        reason: None,
        ..event()
    }
}
