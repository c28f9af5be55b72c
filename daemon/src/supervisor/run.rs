//! The supervisor's life: start, serve, stop.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use hydrant_api::Directories;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::cgroups::Cgroups;
use super::durable;
use super::failed::News;
use super::kept::{self, Kept, Listener};
use super::manager::{self, End};
use super::mounts;
use super::origins::Origins;
use super::shard::{self, Command, Hooks, Rules, Shard};
use super::store::{Store, WorkerUser};
use super::{Supervisor, lock};
use crate::admin::{AdminSocket, DEFAULT_GROUP, InstanceLock, SocketFile, serve};
use crate::catalog::{Catalog, CatalogError, Segment};
use crate::config::Config;
use crate::fanotify::QueueKind;
use crate::ids::{PoolId, ShardId};
use crate::queue::inflight;
use crate::range::ByteRange;
use crate::standalone::keeper;
use crate::sys::{fdstore, limits, replace};
use crate::worker::sandbox;

/// How often a tree that is in use is tried again when the daemon is to stop.
const RETRY: Duration = Duration::from_secs(1);

/// How often those who wait for too long are looked for then.
const DENY: Duration = Duration::from_millis(250);

/// How long requests may go on before a restart.
const FINISH: Duration = Duration::from_secs(30);

/// What is to be done when a supervisor has ended.
#[derive(Debug)]
pub enum Outcome {
    Ended,
    /// To become the installed one, with these fds ([`replace::replace`]).
    Replace(Vec<(String, OwnedFd)>),
    /// To become the parent of the next, which keeps these fds for it.
    Parent(Vec<(String, OwnedFd)>),
}

/// Runs the supervisor until it is told to stop. `kept`: what the one before it has left.
pub async fn run(
    directories: Directories,
    config: Config,
    mut kept: Kept,
) -> anyhow::Result<Outcome> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "hydrantd must be started as root");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    replace::take_orders().context("can't take signals")?;
    let catalog = directories.state.join("catalog.sqlite");
    if let Err(error @ CatalogError::Newer { .. }) = Catalog::check(&catalog) {
        // who guards what is left goes on: we are not the ones to take over
        return Err(error.into());
    }
    kept.relieve_guard();
    let kept_lock = kept.lock();
    let lifeline = kept.lifeline();
    let mut instance = if kept.is_empty() && kept_lock.is_none() {
        InstanceLock::take(&directories)?
    } else {
        InstanceLock::take_over(&directories, kept_lock.as_ref().map(AsFd::as_fd))?
    };
    let queue = queue_kind(&config, &kept)?;
    let files = limits::raise_open_files().context("can't raise the limit of open files")?;
    let user = not_in_group(worker_user(&config)?, config.socket_group.as_deref())?;
    let store = Store::open(&directories.state, user).with_context(|| {
        format!("can't use the state directory {}", directories.state.display())
    })?;
    store.check_events()?;
    let store = Arc::new(store);
    let catalog = Catalog::open(&catalog)?;
    recover(&catalog, &store).await?;

    // who connects from now on waits until we serve
    let mut socket = match kept.listener() {
        Some(Listener::Managers(passed)) => AdminSocket::passed(passed, &directories)?,
        Some(Listener::Ours(passed)) => AdminSocket::inherited(passed, &directories)?,
        None => AdminSocket::bind(&directories, config.socket_group.as_deref())?,
    };
    let guarded = kept.ids();
    // pools are assigned to shards by their number: it rules as long as there are groups of before
    let count = kept.count().unwrap_or_else(|| config.shards());
    // before there are new groups, from which the next supervisor would conclude that these are guarded
    mounts::clear_unguarded(&catalog, &store, &guarded, count).await;
    let origins = Arc::new(Origins::default());
    let (tell, news) = mpsc::unbounded_channel();
    let hooks = hooks(&catalog, &tell);
    let cgroups = Arc::new(Cgroups::new(&config, &directories.state));
    let (patience, spare) = (config.patience(), config.spare());
    let rules = Rules { patience, cgroups: Arc::clone(&cgroups), spare };
    if kept_lock.is_none()
        && let Some(lock) = instance.keep()
    {
        kept::keep(kept::LOCK, lock);
    }
    let shards = start_shards(count, queue, &mut kept, &store, &origins, &rules, hooks);
    let shards = shards.inspect_err(|_| {
        if guarded.is_empty() {
            kept::forget_all((0..count).map(ShardId));
        }
        cgroups.close();
    })?;
    info!(state = %directories.state.display(), shards = shards.len(), queue = queue.name(), open_files = files.soft, "started");
    let (end, mut ending) = watch::channel(None);
    let supervisor = Arc::new(Supervisor {
        directories: directories.clone(),
        config,
        catalog,
        store,
        origins,
        cgroups: Arc::clone(&cgroups),
        shards,
        queue,
        kept: guarded,
        busy: Mutex::new(HashSet::new()),
        pulling: tokio::sync::Mutex::default(),
        eviction: tokio::sync::RwLock::default(),
        layers: tokio::sync::Mutex::default(),
        useless_pulls: Mutex::default(),
        recorded_next: Mutex::default(),
        fills: Arc::default(),
        windows: Default::default(),
        live: Arc::default(),
        histories: Mutex::default(),
        cloning: Arc::default(),
        end,
        instance: inflight::now(),
        started: Instant::now(),
    });
    supervisor.record_failures(news);
    supervisor.restore_quarantine().await;
    if supervisor.kept.is_empty() {
        // of clones that were cut short; once a pool is mounted it has to wait
        supervisor.collect_garbage().await;
    }
    supervisor.restore().await;
    supervisor.fetch_windows_behind();
    let (listener, file) = (socket.copy()?, socket.take_file());
    let (shut, mut shutting) = watch::channel(false);
    let mut also_shutting = shut.subscribe();
    // who hears from us can rely on it
    let snapshotter = supervisor.listen_for_containerd(kept.containerd(), async move {
        also_shutting.wait_for(|shut| *shut).await.ok();
    });
    let (snapshotter, containerd) = snapshotter.map(|s| (s.task, s.estate)).unzip();
    let server = serve(socket, Arc::clone(&supervisor), async move {
        shutting.wait_for(|shut| *shut).await.ok();
    });
    let server = tokio::spawn(async move {
        server.await.ok();
        if let Some(snapshotter) = snapshotter {
            snapshotter.await.ok();
        }
    });
    let held = if lifeline.is_empty() { String::new() } else { format!("\n{}", keeper::KNOWN) };
    notify(&format!("READY=1{held}"));
    tokio::spawn(manager::keep_watchdog_quiet(supervisor.shards.clone()));
    let end = tokio::select! {
        _ = terminate.recv() => manager::meaning_of_terminate().await,
        _ = interrupt.recv() => End::Stop,
        _ = hangup.recv() => End::Stop,
        Ok(end) = ending.wait_for(Option::is_some) => end.unwrap_or(End::Stop),
        () = manager::end_of_parent() => {
            warn!("the parent has been killed: this process takes its place");
            End::Parent
        }
    };
    match end {
        End::Stop => {
            notify("STOPPING=1");
            info!("stopping");
            supervisor.wind_down().await;
            shut.send_replace(true);
            // requests in hand are answered, but nobody may hold us up
            tokio::time::timeout(Duration::from_secs(10), server).await.ok();
            tokio::task::spawn_blocking(move || cgroups.close()).await.ok();
            instance.release();
            info!("stopped");
            Ok(Outcome::Ended)
        }
        End::HandOver | End::Replace | End::Parent => {
            info!("leaving everything to the next supervisor");
            shut.send_replace(true);
            // a clone in hand gets some time, and the next supervisor does without the rest
            if tokio::time::timeout(FINISH, server).await.is_err() {
                warn!("requests that are not done are given up");
            }
            let mut estate = supervisor.hand_over().await?;
            // an older systemd can't start anything beside groups that are left
            tokio::task::spawn_blocking(move || cgroups.close()).await.ok();
            if end == End::HandOver {
                // the manager has a copy, and the guard none: it has nothing to do until the manager lets go
                supervisor.leave_a_guard(estate);
                return Ok(Outcome::Ended);
            }
            let name = if file.is_some() { kept::OWN_LISTENER } else { kept::LISTENER };
            file.into_iter().for_each(SocketFile::keep);
            estate.push((name.to_owned(), listener));
            estate.extend(containerd);
            if let Some(lock) = instance.keep() {
                estate.push((kept::LOCK.to_owned(), lock.try_clone_to_owned()?));
            }
            estate.extend(lifeline);
            Ok(if end == End::Parent { Outcome::Parent(estate) } else { Outcome::Replace(estate) })
        }
    }
}

/// Where readers wait: as configured, but groups that were kept stay what they are.
fn queue_kind(config: &Config, kept: &Kept) -> anyhow::Result<QueueKind> {
    let configured = config.queue().map_err(anyhow::Error::from).and_then(|c| Ok(c.kind()?));
    let Some(kind) = kept.kind() else { return configured };
    if configured.as_ref().ok() != Some(&kind) {
        let configured = configured.map_or_else(|error| error.to_string(), |c| c.name().into());
        warn!(
            queue = kind.name(),
            configured, "the queue stays what it is until the daemon is stopped"
        );
    }
    Ok(kind)
}

fn worker_user(config: &Config) -> anyhow::Result<WorkerUser> {
    let without_landlock = config.without_landlock.unwrap_or(false);
    if let Some(name) = &config.worker_user {
        let user = nix::unistd::User::from_name(name)
            .with_context(|| format!("can't look the worker_user {name} up"))?
            .with_context(|| format!("there is no user {name}, the configured worker_user"))?;
        anyhow::ensure!(!user.uid.is_root(), "worker_user must not be root");
        let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
        return Ok(WorkerUser { uid, gid, without_landlock });
    }
    let (uid, gid) = sandbox::unused_uid()
        .context("there is no unused uid for the workers; configure worker_user")?;
    Ok(WorkerUser { uid, gid, without_landlock })
}

/// Workers must not be able to talk to the admin socket: its group is never theirs.
fn not_in_group(user: WorkerUser, group: Option<&str>) -> anyhow::Result<WorkerUser> {
    let group = nix::unistd::Group::from_name(group.unwrap_or(DEFAULT_GROUP))
        .context("can't look the admin socket's group up")?;
    if group.is_none_or(|group| group.gid.as_raw() != user.gid) {
        return Ok(user);
    }
    let (_, gid) = sandbox::unused_id()
        .context("there is no unused gid for the workers; configure another socket_group")?;
    Ok(WorkerUser { gid, ..user })
}

/// After the machine went down under a running daemon, blocks that were written may be lost or torn:
/// what is not known to be on the disk is not trusted.
async fn recover(catalog: &Catalog, store: &Store) -> anyhow::Result<()> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let last = catalog.begin_run(boot_id.trim()).await?;
    durable::remove_disposable(catalog, store).await?;
    for path in catalog.unknown_files().await? {
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Ok(()) => info!(path = %path.display(), "removed what no tree refers to"),
            Err(error) => {
                warn!(path = %path.display(), %error, "can't remove what no tree refers to")
            }
        }
    }
    if !last.may_have_lost_writes(boot_id.trim()) {
        return Ok(());
    }
    warn!(
        "the machine went down without a clean stop: content that may be damaged is fetched anew"
    );
    for pool in catalog.pools().await? {
        for segment in catalog.segments(pool.id).await? {
            forget(catalog, store, pool.id, &segment).await.with_context(|| {
                format!("can't punch out segment {} of pool {}", segment.id, pool.id)
            })?;
        }
    }
    // until this is on the disk, every start does it anew
    store.sync().context("can't sync the state directory")?;
    catalog.recovered(boot_id.trim()).await?;
    Ok(())
}

/// Punches all of a segment that is fetched, but for the ends of a pack, which the builder wrote and
/// synced. Not of one that is on record as complete, which was synced before: unless it has holes all
/// the same.
async fn forget(
    catalog: &Catalog,
    store: &Store,
    pool: PoolId,
    segment: &Segment,
) -> anyhow::Result<()> {
    if segment.complete {
        let all = ByteRange::new(0, segment.size);
        if matches!(store.is_present(pool, segment.id, all), Ok(true)) {
            return Ok(());
        }
        warn!(%pool, segment = %segment.id, "a segment that was complete is not: has the file system lost data?");
        catalog.set_complete(segment.id, false).await?;
    }
    match store.punch(pool, segment.id, segment.kind) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => Ok(result?),
    }
}

/// What a shard's hooks do.
fn hooks(catalog: &Catalog, tell: &mpsc::UnboundedSender<News>) -> impl Fn(ShardId) -> Hooks {
    let (catalog, tell) = (catalog.clone(), tell.clone());
    let runtime = tokio::runtime::Handle::current();
    move |id| {
        let (catalog, runtime) = (catalog.clone(), runtime.clone());
        let (given_up, settled, touched) = (tell.clone(), tell.clone(), tell.clone());
        let refuted = tell.clone();
        Hooks {
            on_complete: Arc::new(move |segment, proved| {
                let catalog = catalog.clone();
                runtime.spawn(async move {
                    let noted = match proved {
                        true => catalog.set_proved(segment).await,
                        false => catalog.set_complete(segment, true).await,
                    };
                    if let Err(error) = noted {
                        error!(%segment, %error, "can't note that a segment is complete");
                    }
                });
            }),
            on_refuted: Arc::new(move |segment, why| {
                refuted.send(News::Refuted(segment, why)).ok();
            }),
            on_given_up: Arc::new(move |event| {
                given_up.send(News::GivenUp(id, Box::new(event))).ok();
            }),
            on_settled: Arc::new(move |segment, range| {
                settled.send(News::Settled(segment, range)).ok();
            }),
            on_touched: Arc::new(move |segment, records| {
                touched.send(News::Touched(segment, records)).ok();
            }),
        }
    }
}

fn start_shards(
    count: u16,
    queue: QueueKind,
    kept: &mut Kept,
    store: &Arc<Store>,
    origins: &Arc<Origins>,
    rules: &Rules,
    hooks: impl Fn(ShardId) -> Hooks,
) -> anyhow::Result<Vec<shard::ShardHandle>> {
    // threads of their own: whatever holds a request up does not hold up readers
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("shard")
        .enable_all()
        .build()
        .context("can't start the shards' threads")?;
    // lives as long as the process
    let threads: &'static tokio::runtime::Runtime = Box::leak(Box::new(threads));
    let _entered = threads.enter();
    (0..count)
        .map(ShardId)
        .map(|id| {
            let (store, origins) = (Arc::clone(store), Arc::clone(origins));
            Shard::start(id, queue, kept.take(id), store, origins, rules.clone(), hooks(id))
                .context("can't watch files: `hydrant doctor` checks what this machine can do")
        })
        .collect()
}

impl Supervisor {
    /// Unmounts everything, then lets the groups go: never the other way round. A tree that is in use
    /// is served until it is free, but nobody who waits for an origin holds that up for long.
    async fn wind_down(&self) {
        // a clone that is not in its place by now finds no place any more
        lock(&self.live).stopping = true;
        tokio::select! {
            () = self.unmount_all() => {}
            never = self.deny_late() => match never {},
        }
        for shard in &self.shards {
            shard.ask(|reply| Command::Stop { reply }).await;
        }
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || store.sync()).await {
            Ok(Ok(())) => {
                if let Err(error) = self.catalog.end_run().await {
                    error!(%error, "can't note the clean stop");
                }
            }
            Ok(Err(error)) => error!(%error, "can't sync the state directory"),
            Err(error) => error!(%error, "can't sync the state directory"),
        }
        kept::forget_all(self.shards.iter().map(|shard| shard.id));
        info!(up_secs = self.started.elapsed().as_secs(), "all trees are unmounted");
    }

    /// Denies who waits for longer than [`GRACE`](shard::GRACE), once that has passed.
    async fn deny_late(&self) -> Infallible {
        tokio::time::sleep(shard::GRACE).await;
        loop {
            for shard in &self.shards {
                shard.send(Command::DenyLate);
            }
            tokio::time::sleep(DENY).await;
        }
    }

    /// Returns once nobody can read a tree any more.
    async fn unmount_all(&self) {
        let mut said = HashSet::new();
        loop {
            let mounts = self.catalog.mounts().await.unwrap_or_default();
            let live: HashSet<_> = lock(&self.live).mounts.keys().copied().collect();
            if live.is_empty() {
                break;
            }
            for mount in mounts.into_iter().filter(|mount| live.contains(&mount.id)) {
                if let Err(error) = self.take_down(&mount).await
                    && said.insert(mount.id)
                {
                    error!(directory = %mount.directory.display(), %error, "waiting for a tree to be free");
                }
            }
            if lock(&self.live).mounts.is_empty() {
                break;
            }
            tokio::time::sleep(RETRY).await;
        }
        self.unmount_layers().await;
        self.wait_for_other_namespaces().await;
    }
}

impl Supervisor {
    /// A tree that is unmounted here may still be mounted in a container. Its readers would see zeros
    /// once the groups are gone, so the groups stay until nobody has an incomplete segment open.
    async fn wait_for_other_namespaces(&self) {
        let pools = self.catalog.pools().await.unwrap_or_default();
        for pool in &pools {
            if let Ok(shard) = self.shard(pool.id) {
                // our own workers count as users otherwise
                shard.ask(|reply| Command::Detach { pool: pool.id, reply }).await;
            }
        }
        let mut said = false;
        let begun = Instant::now();
        for pool in &pools {
            let segments = self.catalog.segments(pool.id).await.unwrap_or_default();
            for segment in segments.into_iter().filter(|segment| !segment.complete) {
                while self.store.is_in_use(pool.id, segment.id).unwrap_or(false) {
                    // the kernel closes the files of an unmounted tree a moment later
                    if begun.elapsed() > RETRY && !said {
                        said = true;
                        error!(pool = %pool.id, segment = %segment.id,
                            "a tree is still mounted in another mount namespace: waiting for its end; \
                             what is not there is denied");
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

/// Tells the service manager (sd_notify(3)).
fn notify(state: &str) {
    if let Err(error) = fdstore::notify(state) {
        warn!(%error, state, "can't notify the service manager");
    }
}
