//! The builder, as the supervisor sees it.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::builder::layer::LayerJob;
use crate::builder::segment::{CompareJob, ProveJob};
use crate::builder::{Job, Line, Reply};
use crate::sys::spawn::{Child, Role, Spawn};

/// A builder process.
#[derive(Debug)]
pub struct Builder {
    _child: Child,
    to: tokio::net::unix::OwnedWriteHalf,
    from: BufReader<tokio::net::unix::OwnedReadHalf>,
}

impl Builder {
    /// Starts a builder, which waits for a job.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let child = Spawn::role(Role::Builder)
            .inherit(&["RUST_LOG"])
            .fd(theirs)
            .start()
            .map_err(io::Error::other)?;
        ours.set_nonblocking(true)?;
        let (from, to) = tokio::net::UnixStream::from_std(ours)?.into_split();
        Ok(Self { _child: child, to, from: BufReader::new(from) })
    }

    /// Has a tree built.
    pub async fn build(&mut self, job: Job) -> io::Result<Reply> {
        self.work(&Line::Tree(Box::new(job))).await
    }

    /// Has a layer of a container image built.
    pub async fn build_layer(&mut self, job: LayerJob) -> io::Result<Reply> {
        self.work(&Line::Layer { layer: job }).await
    }

    /// Has a layer proved that has come piece by piece.
    pub async fn prove(&mut self, job: ProveJob) -> io::Result<Reply> {
        self.work(&Line::Prove { prove: job }).await
    }

    /// Has two manifests of a layer compared.
    pub async fn compare(&mut self, job: CompareJob) -> io::Result<Reply> {
        self.work(&Line::Compare { compare: job }).await
    }

    async fn work(&mut self, work: &Line) -> io::Result<Reply> {
        let mut line = serde_json::to_vec(work)?;
        line.push(b'\n');
        self.to.write_all(&line).await?;
        let mut reply = String::new();
        if self.from.read_line(&mut reply).await? == 0 {
            return Err(io::Error::other("the builder ended without a result"));
        }
        Ok(serde_json::from_str(&reply)?)
    }
}
