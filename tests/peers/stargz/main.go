// stargz-snapshotter as a program, for the benchmark of container images: Debian has its sources and its client only.
//
//	stargz-snapshotter SOCKET DIRECTORY
//
// Serves containerd on SOCKET, with everything as it is without a configuration. Its state is in DIRECTORY. It runs until it is
// killed.
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

func serve(socket, directory string) error {
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), directory, &service.Config{})
	if err != nil {
		return fmt.Errorf("can't make the snapshotter: %w", err)
	}
	defer snapshotter.Close()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("can't listen: %w", err)
	}
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	return server.Serve(listener)
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: stargz-snapshotter SOCKET DIRECTORY")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
