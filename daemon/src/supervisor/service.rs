//! The supervisor as the admin server's service.

use std::path::Path;

use hydrant_api::{
    Cleared, CloneRequest, Evicted, FailedEvent, Image, ImageRequest, IndexRequest, Mount,
    MountImageRequest, PathRequest, PrefetchRequest, PullRequest, QueueEvent, RestartRequest,
    RmRequest, Status, Summary, TraceRequest, TracedLayer, UmountRequest, Worker,
};

use super::Supervisor;
use super::manager::End;
use super::queue::no_event;
use super::shard::Command;
use crate::admin::{ApiError, Caller, ProgressSender, Service};
use crate::ids::EventId;

impl Service for Supervisor {
    fn state_dir(&self) -> &Path {
        &self.directories.state
    }

    async fn status(&self, _: Caller) -> Result<Status, ApiError> {
        self.describe_daemon().await
    }

    async fn mounts(&self, _: Caller) -> Result<Vec<Mount>, ApiError> {
        self.describe_all().await
    }

    async fn clone_tree(
        &self,
        caller: Caller,
        request: CloneRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.clone_to(&caller, &request, &progress).await
    }

    async fn mount(&self, caller: Caller, request: PathRequest) -> Result<Mount, ApiError> {
        self.mount_again(&caller, &request.directory).await
    }

    async fn umount(&self, caller: Caller, request: UmountRequest) -> Result<Vec<Mount>, ApiError> {
        self.umount_request(&caller, &request).await
    }

    async fn rm(
        &self,
        caller: Caller,
        request: RmRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.remove_request(&caller, &request, &progress).await
    }

    async fn prefetch(
        &self,
        caller: Caller,
        request: PrefetchRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.prefetch_request(&caller, &request, &progress).await
    }

    async fn images(&self, _: Caller) -> Result<Vec<Image>, ApiError> {
        self.list_images().await
    }

    async fn pull_image(
        &self,
        caller: Caller,
        request: PullRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.pull_request(&caller, &request, &progress).await
    }

    async fn index_image(
        &self,
        caller: Caller,
        request: IndexRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.index_request(&caller, &request, &progress).await
    }

    async fn trace_image(
        &self,
        caller: Caller,
        request: TraceRequest,
    ) -> Result<Vec<TracedLayer>, ApiError> {
        self.trace_request(&caller, &request).await
    }

    async fn mount_image(
        &self,
        caller: Caller,
        request: MountImageRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.mount_image_request(&caller, &request, &progress).await
    }

    async fn evict_image(
        &self,
        caller: Caller,
        request: ImageRequest,
    ) -> Result<Evicted, ApiError> {
        Supervisor::evict_image(self, &caller, &request).await
    }

    async fn rm_image(&self, caller: Caller, request: ImageRequest) -> Result<(), ApiError> {
        self.remove_image(&caller, &request).await
    }

    async fn queue(&self, _: Caller) -> Result<Vec<QueueEvent>, ApiError> {
        Ok(self.queue_events().await)
    }

    async fn queue_event(&self, _: Caller, event: EventId) -> Result<QueueEvent, ApiError> {
        let events = self.queue_events().await;
        events.into_iter().find(|found| found.id == event.0).ok_or_else(|| no_event(event))
    }

    async fn retry(&self, caller: Caller, event: EventId) -> Result<(), ApiError> {
        caller.require_root("retry an event")?;
        self.event_command(event, |event, reply| Command::Retry { event, reply }).await
    }

    async fn deny(&self, caller: Caller, event: EventId) -> Result<(), ApiError> {
        caller.require_root("deny an event")?;
        self.event_command(event, |event, reply| Command::Deny { event, reply }).await
    }

    async fn failed(&self, _: Caller) -> Result<Vec<FailedEvent>, ApiError> {
        self.failed_events().await
    }

    async fn clear_failed(&self, caller: Caller) -> Result<Cleared, ApiError> {
        caller.require_root("clear the records of failed events")?;
        self.clear_failed_events().await
    }

    async fn workers(&self, _: Caller) -> Result<Vec<Worker>, ApiError> {
        Ok(self.list_workers().await)
    }

    async fn restart_workers(
        &self,
        caller: Caller,
        request: RestartRequest,
    ) -> Result<Vec<Worker>, ApiError> {
        caller.require_root("restart workers")?;
        self.replace_workers(&request).await
    }

    async fn reload(&self, _: Caller) -> Result<(), ApiError> {
        self.check_successor().await?;
        self.end.send_replace(Some(End::Replace));
        Ok(())
    }

    async fn stop(&self, _: Caller) -> Result<(), ApiError> {
        self.end.send_replace(Some(End::Stop));
        Ok(())
    }
}
