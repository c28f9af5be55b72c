"""What stands in front of a registry: a handler that can pass requests on, and a server that says its port."""
import http.server, urllib.error, urllib.request


class Passing(http.server.BaseHTTPRequestHandler):
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

    def ask(self, url, data=None):
        """What is answered: status, headers, body. The registry's own errors have neither headers nor a body."""
        request = urllib.request.Request(url, data=data or None, method=self.command)
        for name in ["Accept", "Range", "Content-Type"]:
            if name in self.headers:
                request.add_header(name, self.headers[name])
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            return error.code, {}, b""
        body = answer.read()
        names = ["Content-Type", "Content-Range", "Docker-Content-Digest", "Location"]
        headers = {name: answer.headers[name] for name in names if name in answer.headers}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.headers.get("Content-Length", "0")
        return answer.status, headers, body


def serve(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_port, flush=True)
    server.serve_forever()
