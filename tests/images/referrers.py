#!/usr/bin/env python3
"""Stands in front of a registry and knows what refers to what: referrers.py UPSTREAM DIRECTORY

Prints its port. It has the list of referrers of the distribution specification 1.1, of what is put there through it. Who
writes must be the user `user` with the password `secret`. What is asked is written to DIRECTORY/log.
"""
import base64, hashlib, http.server, json, sys, threading, urllib.error, urllib.request

UPSTREAM, DIRECTORY = sys.argv[1:3]
WANTED = "Basic " + base64.b64encode(b"user:secret").decode()
referrers, lock = {}, threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, headers={}, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

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
        request = urllib.request.Request(UPSTREAM + self.path, data=data or None, method=self.command)
        for name in ["Accept", "Range", "Content-Type"]:
            if name in self.headers:
                request.add_header(name, self.headers[name])
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            return self.answer(error.code)
        body = answer.read()
        names = ["Content-Type", "Content-Range", "Docker-Content-Digest", "Location"]
        headers = {name: answer.headers[name] for name in names if name in answer.headers}
        if "Location" in headers:
            headers["Location"] = headers["Location"].removeprefix(UPSTREAM)
        if self.command == "HEAD":
            headers["Content-Length"] = answer.headers.get("Content-Length", "0")
        if self.command == "PUT" and "/manifests/" in self.path and "subject" in (manifest := json.loads(data)):
            subject = manifest["subject"]["digest"]
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            with lock:
                referrers.setdefault(subject, []).append({
                    "mediaType": manifest["mediaType"], "digest": digest, "size": len(data),
                    "artifactType": manifest["artifactType"], "annotations": manifest.get("annotations", {})})
            headers["OCI-Subject"] = subject
        self.answer(answer.status, headers, body)

    do_GET = do_HEAD = do_POST = do_PUT = do


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
