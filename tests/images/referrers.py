#!/usr/bin/env python3
"""Stands in front of a registry and knows what refers to what: referrers.py UPSTREAM DIRECTORY

Prints its port. It has the list of referrers of the distribution specification 1.1, of what is put there through it. Who
writes must be the user `user` with the password `secret`. What is asked is written to DIRECTORY/log.
"""
import base64, hashlib, json, sys, threading

from passing import Passing, serve

UPSTREAM, DIRECTORY = sys.argv[1:3]
WANTED = "Basic " + base64.b64encode(b"user:secret").decode()
referrers, lock = {}, threading.Lock()


class Handler(Passing):
    def do(self):
        with lock, open(f"{DIRECTORY}/log", "a") as file:
            file.write(f"{self.command} {self.path}\n")
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT") and self.headers.get("Authorization") != WANTED:
            return self.answer(401, {"WWW-Authenticate": 'Basic realm="test"'})
        if "/referrers/" in self.path:
            subject = self.path.split("/")[-1].split("?")[0]
            with lock:
                manifests = referrers.get(subject, [])
            kind = "application/vnd.oci.image.index.v1+json"
            body = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}).encode()
            return self.answer(200, {"Content-Type": kind}, body)
        status, headers, body = self.ask(UPSTREAM + self.path, data)
        if status >= 400:
            return self.answer(status)
        if "Location" in headers:
            headers["Location"] = headers["Location"].removeprefix(UPSTREAM)
        if self.command == "PUT" and "/manifests/" in self.path and "subject" in (manifest := json.loads(data)):
            subject = manifest["subject"]["digest"]
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            with lock:
                referrers.setdefault(subject, []).append({
                    "mediaType": manifest["mediaType"], "digest": digest, "size": len(data),
                    "artifactType": manifest["artifactType"], "annotations": manifest.get("annotations", {})})
            headers["OCI-Subject"] = subject
        self.answer(status, headers, body)

    do_GET = do_HEAD = do_POST = do_PUT = do


serve(Handler)
