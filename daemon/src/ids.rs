//! Identities. Each is a number of its own type, so that none can stand in for another.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($repr:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A segment: one sparse file of content, unique in a state directory for ever.
    SegmentId(u64)
}
id! {
    /// A pool: the segments of one origin, shared by every tree of that origin.
    PoolId(u64)
}
id! {
    /// A tree: one revision of an origin, as one EROFS image.
    TreeId(u64)
}
id! {
    /// A mount: a tree at a directory.
    MountId(u64)
}
id! {
    /// A container image as it was pulled.
    ImageId(u64)
}
id! {
    /// A snapshot of containerd's.
    SnapshotId(u64)
}
id! {
    /// A shard: a fanotify group with its queue and its worker.
    ShardId(u16)
}
id! {
    /// One permission event, unique in the life of a supervisor.
    EventId(u64)
}
