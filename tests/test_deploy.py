"""The files in deploy/ fit together, and nginx does what its configuration promises."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from bdh.serve.config import LimitSettings

FOLDER = Path(__file__).parent.parent / "deploy"
HISTOGRAMS = {
    "bdh:time_to_first_token_seconds",
    "bdh:inter_token_latency_seconds",
    "bdh:e2e_request_latency_seconds",
    "bdh:request_queue_time_seconds",
}
OTHER_METRICS = {
    "bdh:num_requests_running",
    "bdh:num_requests_waiting",
    "bdh:state_bytes_in_use",
    "bdh:state_bytes_limit",
    "bdh:prefix_cache_bytes",
    "bdh:saved_states",
    "bdh:saved_state_bytes",
    "bdh:prompt_tokens_total",
    "bdh:generation_tokens_total",
    "bdh:request_success_total",
    "bdh:requests_total",
    "bdh:prefix_cache_hits_total",
    "bdh:prefix_cache_tokens_total",
    "bdh:prefix_cache_failures_total",
}


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def settings():
    return yaml.safe_load(read("serve.yaml"))


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(read("compose.yaml"))


@pytest.fixture(scope="module")
def kubernetes():
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(read("kubernetes.yaml"))}


@pytest.fixture(scope="module")
def pod(kubernetes):
    return kubernetes["StatefulSet", "bdh"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def unit():
    """Settings of the unit; the last one wins, as in systemd for those that are read here."""
    lines = (line for line in read("bdh.service").splitlines() if "=" in line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def dockerfile():
    """The instructions, without comments and with continued lines joined."""
    lines = [line for line in read("Dockerfile").splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def instruction(dockerfile, name):
    return [line.split(maxsplit=1)[1] for line in dockerfile if line.startswith(name + " ")]


def request_timeout(settings):
    return settings.get("limits", {}).get("request_timeout", LimitSettings().request_timeout)


def seconds(text):
    match = re.fullmatch(r"(\d+)s?", str(text))
    assert match, text
    return int(match[1])


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.y*ml")), ids=lambda path: path.name)
def test_yaml_parses(path):
    assert all(yaml.safe_load_all(path.read_text(encoding="utf-8")))


# The image


def test_the_image_runs_without_root_and_hears_signals(dockerfile):
    assert instruction(dockerfile, "USER") == ["10001:10001"]
    assert instruction(dockerfile, "STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(instruction(dockerfile, "ENTRYPOINT")[-1]) == ["bdh", "serve"]
    assert json.loads(instruction(dockerfile, "CMD")[-1])[0] == "/model"
    assert instruction(dockerfile, "EXPOSE") == ["8000"]


def test_the_health_check_of_the_image_is_a_program_that_runs(dockerfile):
    (check,) = instruction(dockerfile, "HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("CMD ") + 4 :])
    assert (program, flag) == ("python", "-c")
    assert "http://127.0.0.1:8000/health/live" in code
    replica = Replica("one")
    command = [sys.executable, flag, code.replace("8000", str(replica.port))]
    # A proxy that is not there must not be asked.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    for replica.status, succeeds in ((200, True), (503, False)):
        result = subprocess.run(command, env=environment, capture_output=True)
        assert (result.returncode == 0) == succeeds
    replica.stop()
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0


def test_the_index_of_pytorch_is_an_argument_and_nothing_else_comes_from_it(dockerfile):
    assert instruction(dockerfile, "ARG")[1:] == ['TORCH_INDEX_URL=""']
    (line,) = [line for line in dockerfile if "--index-url" in line]
    assert "--no-deps" in line
    assert "-c constraints.txt torch;" in line
    pins = (FOLDER.parent / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==", pins, re.MULTILINE)  # else the second step could take another version


def test_the_build_sees_what_it_copies_and_no_more(dockerfile):
    patterns = [line for line in read("Dockerfile.dockerignore").splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copies = [line.split()[:-1] for line in instruction(dockerfile, "COPY") if not line.startswith("--from")]
    copied = {source.split("/")[0] for sources in copies for source in sources}
    assert copied == allowed
    assert all((FOLDER.parent / name).exists() for name in allowed)


# Settings, and who waits for whom


def test_the_copy_of_the_settings_in_kubernetes_is_equal(settings, kubernetes):
    assert yaml.safe_load(kubernetes["ConfigMap", "bdh"]["data"]["serve.yaml"]) == settings


def test_everyone_speaks_to_the_port_of_the_server(settings, compose, kubernetes, pod, unit, dockerfile):
    assert settings["port"] == 8000
    assert settings["host"] == "0.0.0.0"
    replicas = {name for name in compose["services"] if name.startswith("bdh-")}
    assert set(re.findall(r"^\s*server (\S+):8000 ", read("nginx.conf"), re.MULTILINE)) == replicas
    (job,) = yaml.safe_load(read("prometheus.yml"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"{name}:8000" for name in sorted(replicas)]}]
    (container,) = pod["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    for name in ("bdh", "bdh-replicas"):
        assert kubernetes["Service", name]["spec"]["ports"] == [{"name": "http", "port": 8000, "targetPort": "http"}]
    assert "--port 8000" in unit["ExecStart"]
    assert compose["services"]["nginx"]["ports"] == ["${BDH_BIND:-127.0.0.1}:8080:8080"]
    assert re.search(r"listen 8080;", read("nginx.conf"))


def test_whoever_stops_the_server_waits_longer_than_it_drains(settings, compose, pod, unit):
    drain = settings["drain_timeout"]
    assert drain >= request_timeout(settings)  # else a stop cuts off what may still run
    for name in ("bdh-1", "bdh-2"):
        assert seconds(compose["services"][name]["stop_grace_period"]) > drain
    (pause,) = (int(word) for word in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1:])
    assert pod["terminationGracePeriodSeconds"] > pause + drain
    assert seconds(unit["TimeoutStopSec"]) > drain
    shutdown = seconds(re.search(r"worker_shutdown_timeout (\w+);", read("nginx.conf"))[1])
    assert drain <= shutdown < seconds(compose["services"]["nginx"]["stop_grace_period"])


def test_nginx_waits_for_an_answer_in_one_piece(settings):
    for text in (read("nginx.conf"), one_server_block()):
        assert re.search(r"proxy_read_timeout 1h;", text)
    assert request_timeout(settings) < 3600


# Compose


def test_replicas_differ_in_states_and_address_only(compose):
    one, two = (compose["services"][name] for name in ("bdh-1", "bdh-2"))
    assert "states-1:/states" in one["volumes"]
    assert "states-2:/states" in two["volumes"]
    assert yaml.safe_dump(two) == yaml.safe_dump(one).replace("states-1", "states-2").replace(".11", ".12")
    assert {"states-1", "states-2"} <= set(compose["volumes"])
    hosts = dict(line.split(":", 1) for line in compose["services"]["nginx"]["extra_hosts"])
    assert hosts == {name: compose["services"][name]["networks"]["default"]["ipv4_address"] for name in hosts}
    assert set(hosts) == {"bdh-1", "bdh-2"}


def test_replicas_and_nginx_write_to_tmp_and_volumes_only(compose):
    for name in ("bdh-1", "bdh-2", "nginx"):
        service = compose["services"][name]
        assert service["read_only"]
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
    assert compose["services"]["nginx"]["user"] == "101:101"
    written = re.findall(r"^\s*(?:pid|\w+_temp_path) (\S+);", read("nginx.conf"), re.MULTILINE)
    assert len(written) == 6
    assert all(path.startswith("/tmp/") for path in written)


def test_images_are_pinned_and_what_is_mounted_is_there(compose):
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+|^bdh:local$", service["image"]), name
        for volume in service["volumes"]:
            if volume.startswith("./") and not volume.startswith("./keys:"):
                assert (FOLDER / volume.split(":")[0]).exists(), volume
    watchers = {name for name, service in compose["services"].items() if service.get("profiles") == ["observability"]}
    assert watchers == {"prometheus", "grafana"}


def test_the_keys_are_where_the_settings_say(settings, compose, pod):
    folder, name = os.path.split(settings["auth"]["keys_file"])
    assert name == "api_keys"
    assert f"./keys:{folder}:ro" in compose["services"]["bdh-1"]["volumes"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["keys"]["mountPath"] == folder
    assert "subPath" not in mounts["keys"]
    assert "/keys/" in read(".gitignore").splitlines()


# Kubernetes and systemd


def test_pods_run_without_root_on_a_read_only_disk(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    assert not pod["automountServiceAccountToken"]
    security = pod["containers"][0]["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_probes_ask_what_they_are_for(pod):
    container = pod["containers"][0]
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {
        "startupProbe": "/health/ready",
        "livenessProbe": "/health/live",
        "readinessProbe": "/health/ready",
    }


def test_the_parts_in_kubernetes_find_each_other(settings, kubernetes, pod):
    stateful = kubernetes["StatefulSet", "bdh"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    assert stateful["selector"]["matchLabels"] == labels
    assert kubernetes["PodDisruptionBudget", "bdh"]["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes["Service", "bdh"]["spec"]["selector"] == labels
    assert kubernetes["Service", "bdh"]["spec"]["sessionAffinity"] == "ClientIP"
    assert ("Service", stateful["serviceName"]) in kubernetes
    volumes = {volume["name"] for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts) == volumes | claims
    assert mounts["states"] == settings["states"]["folder"]


def test_the_unit_drains_and_reloads(unit):
    assert unit["KillSignal"] == "SIGTERM"
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit["Restart"] == "on-failure"
    assert unit["User"] == "bdh"
    assert unit["NoNewPrivileges"] == "yes"
    assert "MemoryDenyWriteExecute" not in unit  # the CPU kernels are compiled when they are first used
    assert "/var/lib/bdh/states" in unit["ExecStart"]
    assert "bdh/states" in unit["StateDirectory"].split()


# Metrics


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads(read("grafana/dashboards/bdh.json"))
    source = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yaml"))["datasources"][0]["uid"]
    assert all(panel["datasource"]["uid"] == source for panel in dashboard["panels"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"]]
    names = {name for text in asked for name in re.findall(r"bdh:\w+", text)}
    assert names == {f"{name}_bucket" for name in HISTOGRAMS} | OTHER_METRICS
    assert all(text.count("(") == text.count(")") for text in asked)
    assert all("rate(" in text for text in asked if re.search(r"_total|_bucket", text))
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in dashboard["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_grafana_finds_the_dashboard(compose):
    provider = yaml.safe_load(read("grafana/provisioning/dashboards/bdh.yaml"))["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["services"]["grafana"]["volumes"]


# nginx, running


class Replica(ThreadingHTTPServer):
    """Stands in for a server: notes what it is asked, and answers with its own name."""

    daemon_threads = True

    def __init__(self, name):
        super().__init__(("127.0.0.1", 0), Answer)
        self.name, self.seen, self.status, self.breaks, self.go_on = name, [], 200, False, threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        replica = self.server
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        replica.seen.append((self.command, self.path, self.headers))
        if replica.breaks:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(replica.status)
        self.send_header("X-Request-ID", self.headers["X-Request-ID"])
        if self.path == "/v1/stream":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.chunk(b"data: 1\n\n")
            replica.go_on.wait(20)
            self.chunk(b"data: 2\n\n")
            self.chunk(b"")
            return
        body = replica.name.encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *arguments):
        pass


class Proxy:
    def __init__(self, port, replicas):
        self.port, self.replicas = port, replicas

    def ask(self, path="/v1/models", method="GET", key=None, body=None, **headers):
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body=body, headers=headers)
        return connection.getresponse()

    def of(self, key):
        """The replica that a key goes to, and the other one."""
        name = self.ask(key=key).read().decode()
        one, two = self.replicas
        return (one, two) if one.name == name else (two, one)


def find_nginx():
    path = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip("nginx is not installed")
    return path


def one_server_block():
    """The configuration for one server that the page on deployment gives."""
    page = (FOLDER.parent / "docs/deployment.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```nginx\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return block


def write_configuration(folder, port, replicas):
    """The shipped configuration, with names and paths that there are here."""
    changes = [("listen 8080;", f"listen 127.0.0.1:{port};"), ("/tmp/", f"{folder}/"), ("/dev/stdout", f"{folder}/log")]
    changes += [(f"server bdh-{i}:8000 ", f"server 127.0.0.1:{at} ") for i, at in enumerate(replicas, 1)]
    return write_changed(read("nginx.conf"), changes, folder)


def write_one_server_configuration(folder, port, server):
    """That of the page, without TLS, in the shipped one in place of its upstream and its server."""
    frame = re.sub(r"\n    upstream bdh .*", f"\n{one_server_block()}}}\n", read("nginx.conf"), flags=re.DOTALL)
    changes = [("listen 443 ssl;", f"listen 127.0.0.1:{port};"), ("    ssl_certificate", "    # ssl_certificate")]
    changes += [("127.0.0.1:8000", f"127.0.0.1:{server}"), ("/tmp/", f"{folder}/"), ("/dev/stdout", f"{folder}/log")]
    return write_changed(frame, changes, folder)


def write_changed(text, changes, folder):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "nginx.conf"
    # For root, nginx would give its workers to a user who cannot read this folder.
    path.write_text(("user root;\n" if os.geteuid() == 0 else "") + text, encoding="utf-8")
    return ["-p", str(folder), "-e", "stderr", "-c", str(path)]


def test_nginx_accepts_its_configuration(tmp_path):
    result = subprocess.run(
        [find_nginx(), "-t", *write_configuration(tmp_path, 8080, (8001, 8002))], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "[warn]" not in result.stderr


@pytest.fixture
def proxy(tmp_path):
    with running_proxy(tmp_path, ["one", "two"], write_configuration) as proxy:
        yield proxy


@pytest.fixture(params=["shipped", "of the page"])
def any_proxy(tmp_path, request):
    """Each of the two configurations."""
    if request.param == "shipped":
        running = running_proxy(tmp_path, ["one", "two"], write_configuration)
    else:
        running = running_proxy(
            tmp_path, ["one"], lambda folder, port, ports: write_one_server_configuration(folder, port, *ports)
        )
    with running as proxy:
        yield proxy


@contextmanager
def running_proxy(folder, names, write):
    nginx = find_nginx()
    replicas = [Replica(name) for name in names]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = write(folder, port, [replica.port for replica in replicas])
    process = subprocess.Popen([nginx, *arguments, "-g", "daemon off;"], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        yield Proxy(port, replicas)
    finally:
        for replica in replicas:
            replica.go_on.set()
        process.terminate()
        process.communicate(timeout=20)
        for replica in replicas:
            replica.stop()


def test_a_key_stays_with_its_replica(proxy):
    of_keys = [{proxy.ask(key=f"key-{i}").read() for _ in range(3)} for i in range(30)]
    assert all(len(names) == 1 for names in of_keys)
    assert set.union(*of_keys) == {b"one", b"two"}
    assert len({proxy.ask().read() for _ in range(5)}) == 1  # without a key: by address


def test_a_stream_is_not_held_back(proxy):
    assert "proxy_buffering off;" in read("nginx.conf")  # what it changes, a slow client, takes long to show
    response = proxy.ask("/v1/stream", "POST", body="{}")
    assert response.readline() == b"data: 1\n"  # while the replica still waits
    for replica in proxy.replicas:
        replica.go_on.set()
    assert response.read() == b"\ndata: 2\n\n"


def test_headers_say_who_asks(proxy):
    response = proxy.ask(key="a", **{"X-Request-ID": "mine-1", "X-Forwarded-For": "192.0.2.7"})
    assert response.headers.get_all("X-Request-ID") == ["mine-1"]
    proxy.ask(key="a", **{"X-Request-ID": 'not "fit" for a log'}).read()
    (_, _, first), (_, _, second) = proxy.of("a")[0].seen[:2]
    assert first["X-Request-ID"] == "mine-1"
    assert first["X-Forwarded-For"] == "192.0.2.7, 127.0.0.1"
    assert first["Authorization"] == "Bearer a"
    assert re.fullmatch("[0-9a-f]{32}", second["X-Request-ID"])


def test_a_post_is_never_run_twice(proxy):
    mine, other = proxy.of("a")
    mine.seen.clear()
    mine.breaks = True
    response = proxy.ask("/v1/completions", "POST", key="a", body="{}")
    assert response.status == 502
    assert json.loads(response.read())["error"]["code"] == "upstream_unavailable"
    assert len(response.headers.get_all("X-Request-ID")) == 1
    mine.breaks, mine.status = False, 503
    response = proxy.ask("/v1/completions", "POST", key="a", body="{}")
    assert (response.status, response.read().decode()) == (503, mine.name)
    assert len(mine.seen) == 2
    assert not other.seen


def test_a_replica_that_drains_is_passed_over_where_that_is_safe(proxy):
    mine, other = proxy.of("a")
    mine.status = 503
    assert proxy.ask("/v1/models", key="a").read().decode() == other.name
    assert proxy.ask("/v1/states/s", key="a").status == 503
    assert proxy.ask("/v1/states/s", "DELETE", key="a").status == 503
    assert proxy.ask("/v1/responses/r", key="a").status == 503
    mine.status = 200
    assert proxy.ask(key="a").read().decode() == mine.name  # at once: it was not struck off


def test_a_replica_that_is_away_is_stood_in_for_but_not_for_its_states(proxy):
    mine, other = proxy.of("a")
    mine.stop()
    for _ in range(3):
        response = proxy.ask("/v1/completions", "POST", key="a", body="{}")
        assert (response.status, response.read().decode()) == (200, other.name)
    other.seen.clear()
    assert proxy.ask("/v1/states/s", key="a").status == 502
    assert proxy.ask("/v1/states", key="a").status == 502
    assert proxy.ask("/v1/responses/r/input_items", key="a").status == 502
    assert not other.seen


def assert_error(response, status, code):
    """An error as OpenAI's clients read it."""
    assert response.status == status
    assert response.headers["Content-Type"] == "application/json"
    error = json.loads(response.read())["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}


def test_nginx_refuses_what_is_too_large_and_what_is_private(any_proxy):
    response = any_proxy.ask("/v1/completions", "POST", body=b"x" * (4 * 2**20 + 1))
    assert_error(response, 413, "request_too_large")
    assert any_proxy.ask("/v1/completions", "POST", body=b"x" * (4 * 2**20)).status == 200
    for path in ("/metrics", "/metrics/"):  # the server answers both
        assert_error(any_proxy.ask(path), 404, "not_found")
    assert [path for replica in any_proxy.replicas for _, path, _ in replica.seen] == ["/v1/completions"]


def test_a_server_that_is_away_is_an_error_that_clients_can_read(any_proxy):
    for replica in any_proxy.replicas:
        replica.breaks = True
    assert_error(any_proxy.ask("/v1/completions", "POST", body="{}"), 502, "upstream_unavailable")
    for replica in any_proxy.replicas:
        replica.stop()
    assert_error(any_proxy.ask("/v1/completions", "POST", body="{}"), 502, "upstream_unavailable")


def test_nginx_has_a_health_of_its_own(proxy):
    assert proxy.ask("/nginx-health").status == 200
    assert not any(replica.seen for replica in proxy.replicas)


def test_the_log_holds_no_keys(proxy, tmp_path):
    proxy.ask("/v1/models?token=secret-1", key="secret-2").read()
    for _ in range(200):
        lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
        if lines:
            break
        time.sleep(0.01)
    assert json.loads(lines[0])["path"] == "/v1/models"
    assert "secret" not in "\n".join(lines)
