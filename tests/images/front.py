#!/usr/bin/env python3
"""Stands in front of a registry and wants a token: front.py UPSTREAM DIRECTORY [--open]

Prints its port. Who has no token is sent to its token server (`/token`), which wants the user `user` with the password
`secret`, or the identity token `refresh`. A token is good for a few requests. Blobs are given by redirects to
`localhost`, another host to any client, where nobody may show any credential. With `--open` nobody is to show any at all.
What is asked is written to DIRECTORY/log; whatever is wrong to DIRECTORY/wrong. With a file DIRECTORY/lie, answers to requests
for a range are not what was asked for. With a file DIRECTORY/hold, blobs of which it has the digest are not given as a whole.
"""
import base64, json, os, sys, threading, urllib.parse

from passing import Passing, serve

UPSTREAM, DIRECTORY = sys.argv[1:3]
OPEN = "--open" in sys.argv
USES = 3
tokens, lock = {}, threading.Lock()


def note(name, line):
    with lock, open(f"{DIRECTORY}/{name}", "a") as file:
        file.write(line + "\n")


class Handler(Passing):
    def note_request(self):
        authorization = self.headers.get("Authorization", "")
        header = self.headers.get("X-Test", "")
        note("log", f"{self.path} {authorization.split(' ')[0]} {self.headers.get('Range', '')} {header}")
        return authorization

    def token(self, name):
        token = base64.b64encode(os.urandom(12)).decode()
        with lock:
            tokens[token] = USES
        self.answer(200, {"Content-Type": "application/json"}, json.dumps({name: token}).encode())

    def do_POST(self):
        self.note_request()
        form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        wanted = {"grant_type": "refresh_token", "refresh_token": "refresh", "service": "test"}
        if self.path != "/token" or any(form.get(name) != value for name, value in wanted.items()) or "scope" not in form:
            return self.answer(401)
        self.token("access_token")

    def do_GET(self):
        authorization = self.note_request()
        if OPEN:
            if authorization:
                note("wrong", "a credential was shown to a host that it is not for")
            return self.forward(self.path)
        port = self.server.server_port
        if self.path.startswith("/token"):
            wanted = "Basic " + base64.b64encode(b"user:secret").decode()
            if authorization != wanted:
                return self.answer(401)
            return self.token("token")
        if self.path.startswith("/store/"):
            if authorization or "X-Test" in self.headers:
                note("wrong", "a credential was shown to the blob store")
                return self.answer(400)
            return self.forward(self.path.removeprefix("/store"))
        with lock:
            token = authorization.removeprefix("Bearer ")
            good = tokens.get(token, 0) > 0
            if good:
                tokens[token] -= 1
        if not good:
            realm = f"http://127.0.0.1:{port}/token"
            return self.answer(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="test"'})
        if "/blobs/" in self.path:
            return self.answer(307, {"Location": f"http://localhost:{port}/store{self.path}"})
        self.forward(self.path)

    def is_held(self):
        try:
            with open(f"{DIRECTORY}/hold") as file:
                held = file.read()
        except FileNotFoundError:
            return False
        return "Range" not in self.headers and self.path.rsplit("/", 1)[1] in held

    def forward(self, path):
        if self.is_held():
            return self.answer(503)
        status, headers, body = self.ask(UPSTREAM + path)
        if "Range" in self.headers and os.path.exists(f"{DIRECTORY}/lie"):
            body = bytes(byte ^ 0x55 for byte in body)
        self.answer(status, headers, body)


serve(Handler)
