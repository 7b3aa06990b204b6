"""security.toml and volume.toml: search, merge, environment, what is refused (contract operations.md 2; S1, S2)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pyvolume.config import ServerConfig
from pyvolume.log import V1
from pyvolume.security_config import (
    DiskProbeConfig,
    SecurityConfig,
    SecurityError,
    SecurityLoader,
    Settings,
    SettingsFileError,
    disk_probe,
    find_file,
    read_file,
    search_directories,
    white_list,
)

BOTH_KEYS = '[jwt.signing]\nkey = "w"\n[jwt.signing.read]\nkey = "r"\n'


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the machine's own is found: current directory and home are empty ones."""
    for name in ("cwd", "home", "conf"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def loader(tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags) -> SecurityLoader:
    if toml is not None:
        (tmp_path / "conf" / "security.toml").write_text(toml)
    config = ServerConfig(config_dir=str(tmp_path / "conf"), **flags)
    return SecurityLoader(config, {"HOME": str(tmp_path / "home"), **(environ or {})})


def refusal(tmp_path: Path, toml: str, environ: dict[str, str] | None = None, **flags) -> str:
    with pytest.raises(SecurityError) as caught:
        loader(tmp_path, toml, environ, **flags).load()
    return str(caught.value)


# --- search (2.1) ----------------------------------------------------------------------------------------------------


def test_order_of_directories(tmp_path: Path) -> None:
    got = search_directories("/conf", {"HOME": "/home/u"})
    expected = ["/conf", ".", "/home/u/.seaweedfs", "/usr/local/etc/seaweedfs", "/etc/seaweedfs"]
    assert [str(p) for p in got] == expected
    assert [str(p) for p in search_directories("", {"HOME": "/home/u"})] == expected[1:]


def test_first_directory_with_a_file_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "cwd", tmp_path / "conf"
    (second / "security.toml").write_text("")
    assert find_file("security", [first, second]) == second / "security.toml"
    (first / "security.yaml").write_text("")
    assert find_file("security", [first, second]) == first / "security.yaml"
    (first / "security.toml").write_text("")
    assert find_file("security", [first, second]) == first / "security.toml"
    (first / "security.json").write_text("")
    assert find_file("security", [first, second]) == first / "security.json"


def test_config_dir_is_not_the_only_place(tmp_path: Path) -> None:
    (tmp_path / "cwd" / "security.toml").write_text(BOTH_KEYS)
    assert loader(tmp_path).load().jwt_write_key == b"w"
    assert loader(tmp_path, '[jwt.signing]\nkey = "other"\n').load() == SecurityConfig(jwt_write_key=b"other")


def test_home_directory_is_searched(tmp_path: Path) -> None:
    (tmp_path / "home" / ".seaweedfs").mkdir()
    (tmp_path / "home" / ".seaweedfs" / "security.toml").write_text(BOTH_KEYS)
    assert loader(tmp_path).load().jwt_read_key == b"r"


class Locked:
    """Directories that may not be searched, for whoever runs the tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
        is_file = Path.is_file

        def look(path: Path) -> bool:
            if path.parent in places:
                raise PermissionError(13, "Permission denied", str(path))
            return is_file(path)

        monkeypatch.setattr(Path, "is_file", look)


def test_a_home_of_another_user_ended_the_start_with_a_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home" / ".seaweedfs"
    Locked(monkeypatch, Path("."), home)
    assert loader(tmp_path).load() == SecurityConfig()
    assert f"{home}: permission denied: a security.toml in it could not be seen" in caplog.messages
    assert loader(tmp_path, BOTH_KEYS).load().jwt_write_key == b"w"


def test_a_place_for_settings_that_may_not_be_searched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Locked(monkeypatch, Path("/etc/seaweedfs"))
    made = loader(tmp_path)
    with pytest.raises(SecurityError, match=r"/etc/seaweedfs: permission denied: a security\.toml in it"):
        made.load()
    Locked(monkeypatch, tmp_path / "conf")
    with pytest.raises(SecurityError, match="conf: permission denied"):
        made.load()
    assert made.load_disk_probe() == DiskProbeConfig()


def test_json_before_toml(tmp_path: Path) -> None:
    (tmp_path / "conf" / "security.json").write_text('{"JWT": {"Signing": {"KEY": "from json"}}}')
    assert loader(tmp_path, BOTH_KEYS).load().jwt_write_key == b"from json"


def test_missing_file_is_fine_and_mentioned_at_v1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(V1, "pyvolume"):
        assert loader(tmp_path).load() == SecurityConfig()
    assert caplog.messages[0].startswith(f'Reading : Config File "security" Not Found in "[{tmp_path}/conf ')
    assert caplog.records[0].levelno == V1


def test_unparsable_security_file_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, "[jwt.signing\n")
    assert text.startswith(f"{tmp_path}/conf/security.toml: While parsing config:")


def test_unparsable_security_file_at_a_reload_changes_nothing(tmp_path: Path) -> None:
    made = loader(tmp_path, BOTH_KEYS)
    first = made.load()
    (tmp_path / "conf" / "security.toml").write_text('[jwt.signing]\nkey = "new"\n[guard\n')
    with pytest.raises(SecurityError, match="While parsing config"):
        made.reload(first)
    assert made.settings.text("jwt.signing.key") == "w"


def test_unparsable_volume_file_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "conf" / "volume.toml").write_text("[volume\n")
    assert loader(tmp_path).load_disk_probe() == DiskProbeConfig()
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.messages[0].startswith(f"Reading {tmp_path}/conf/volume.toml: While parsing config:")
    assert caplog.messages[0].endswith(". Skipping optional configuration.")


def test_formats_that_only_upstream_reads_are_refused_for_security(tmp_path: Path) -> None:
    (tmp_path / "conf" / "security.yaml").write_text("jwt: {}")
    with pytest.raises(SecurityError, match=r"security\.yaml: only security\.toml and security\.json are read"):
        loader(tmp_path).load()


def test_formats_that_only_upstream_reads_are_skipped_for_volume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "conf" / "volume.yaml").write_text("volume: {}")
    assert loader(tmp_path).load_disk_probe() == DiskProbeConfig()
    assert "only volume.toml and volume.json are read" in caplog.text


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a = ", b"a = 1\na = 2\n"])
def test_read_file_names_what_is_wrong(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(text)
    with pytest.raises(SettingsFileError, match="While parsing config"):
        read_file(path)


@pytest.mark.parametrize("number", ["9223372036854775808", "-9223372036854775809", "0x" + "f" * 5000])
@pytest.mark.parametrize("line", ["[jwt.signing]\nkey = {}", "[guard]\nwhite_list = [1, {}]"])
def test_numbers_beyond_64_bits_ended_the_start_with_a_stack(tmp_path: Path, number: str, line: str) -> None:
    assert "is not within 64 bits" in refusal(tmp_path, line.format(number))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", '"inf"'])
def test_endless_numbers_ended_the_start_with_a_stack(tmp_path: Path, value: str) -> None:
    (tmp_path / "conf" / "volume.toml").write_text(
        f"[volume.disk.io]\ninterval = {value}\ntimeout = {value}\n[volume.disk.io.min]\nsamples = {value}\n"
    )
    made = loader(tmp_path, f"[jwt.signing]\nexpires_after_seconds = {value}\n")
    assert made.load().jwt_write_expires_s == 0
    probe = made.load_disk_probe()
    assert (probe.interval_s, probe.timeout_s, probe.min_samples) == (0.0, 0.0, 0)


def test_half_a_surrogate_pair_in_json_is_a_replacement_character_as_in_go(tmp_path: Path) -> None:
    (tmp_path / "conf" / "security.json").write_text(r'{"jwt": {"signing": {"key": "\ud800a\ud83d\ude00"}}}')
    assert loader(tmp_path).load().jwt_write_key == "\ufffda\U0001f600".encode()


def test_json_file_must_be_a_table(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(SettingsFileError, match="not a table"):
        read_file(path)


# --- the key space ---------------------------------------------------------------------------------------------------


def settings(tree: dict, environ: dict[str, str] | None = None) -> Settings:
    made = Settings(environ or {})
    made.merge(tree, Path("f.toml"))
    return made


def test_keys_have_no_case_and_no_shape() -> None:
    got = settings({"JWT": {"Signing": {"Key": "a"}}, "jwt.signing.read": {"key": "b"}})
    assert (got.text("jwt.signing.key"), got.text("jwt.signing.read.key")) == ("a", "b")


@pytest.mark.parametrize(
    ("value", "text", "boolean", "integer", "seconds"),
    [
        ("x", "x", False, 0, 0.0),
        ("true", "true", True, 0, 0.0),
        ("12", "12", False, 12, 12e-9),
        ("0x10", "0x10", False, 16, 0.0),
        (12, "12", True, 12, 12e-9),
        (True, "true", True, 1, 1e-9),
        (False, "false", False, 0, 0.0),
        (1.5, "1.5", True, 1, 1.5e-9),
        (2.0, "2", True, 2, 2e-9),
        ([1], "", False, 0, 0.0),
        ("1m30s", "1m30s", False, 0, 90.0),
    ],
)
def test_values_as_other_types(value: object, text: str, boolean: bool, integer: int, seconds: float) -> None:
    got = settings({"k": value})
    assert got.text("k") == text
    assert got.boolean("k") is boolean
    assert got.integer("k", 99) == integer
    assert got.seconds("k", 99.0) == pytest.approx(seconds)


def test_defaults_of_keys_nobody_set() -> None:
    got = Settings({})
    assert (got.text("k"), got.boolean("k"), got.integer("k", 5), got.seconds("k", 2.0)) == ("", False, 5, 2.0)


def test_environment_beats_the_file_unless_empty() -> None:
    tree = {"jwt": {"signing": {"key": "file"}}}
    assert settings(tree, {"WEED_JWT_SIGNING_KEY": "env"}).text("jwt.signing.key") == "env"
    assert settings(tree, {"WEED_JWT_SIGNING_KEY": ""}).text("jwt.signing.key") == "file"
    assert settings({}, {"WEED_GRPC_VOLUME_ALLOWED_COMMONNAMES": "a"}).text("grpc.volume.allowed_commonnames") == "a"


def test_variable_named_like_a_parent_hides_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = loader(tmp_path, BOTH_KEYS, {"WEED_JWT_SIGNING": "x"}).load()
    assert (got.jwt_write_key, got.jwt_read_key) == (b"", b"")
    assert "WEED_JWT_SIGNING hides jwt.signing.read.key" in caplog.text
    assert loader(tmp_path, BOTH_KEYS, {"WEED_JWT_SIGNING": ""}).load().jwt_read_key == b"r"


def test_later_files_are_laid_over_earlier_ones() -> None:
    got = settings({"a": {"b": 1, "c": 2}, "d": 3})
    got.merge({"a": {"b": 10}, "d": {"e": 4}}, Path("g.toml"))
    assert [got.get(k) for k in ("a.b", "a.c", "d", "d.e")] == [10, 2, None, 4]
    got.merge({"a": "scalar"}, Path("h.toml"))
    assert (got.get("a"), got.get("a.b")) == (None, 10)
    assert got.where("a.b") == "g.toml"


# --- what the server takes (2.2) -------------------------------------------------------------------------------------


def test_all_reloadable_keys(tmp_path: Path) -> None:
    toml = (
        '[jwt.signing]\nkey = " kéy "\nexpires_after_seconds = 7\n[jwt.signing.read]\nkey = "r"\n'
        'expires_after_seconds = "8"\n[access]\nui = true\n[guard]\nwhite_list = "10.0.0.0/8"\n'
    )
    got = loader(tmp_path, toml, white_list=("1.2.3.4",)).load()
    assert got == SecurityConfig(
        jwt_write_key=" kéy ".encode(),
        jwt_write_expires_s=7,
        jwt_read_key=b"r",
        jwt_read_expires_s=8,
        white_list=("1.2.3.4", "10.0.0.0/8"),
        ui_access=True,
    )


def test_defaults(tmp_path: Path) -> None:
    got = loader(tmp_path, "").load()
    assert got == SecurityConfig()
    assert (got.jwt_write_expires_s, got.jwt_read_expires_s) == (10, 60)


def test_number_as_a_key_is_its_text(tmp_path: Path) -> None:
    assert loader(tmp_path, "[jwt.signing]\nkey = 12345\n").load().jwt_write_key == b"12345"


@pytest.mark.parametrize("toml", ['[jwt.signing]\nkey = ["k"]\n', '[jwt.signing.key]\nx = "k"\n'])
def test_key_that_is_no_text_is_refused(tmp_path: Path, toml: str) -> None:
    assert refusal(tmp_path, toml).startswith("jwt.signing.key in ")


def test_security_file_is_the_only_one_read(tmp_path: Path) -> None:
    exact = tmp_path / "exact.toml"
    exact.write_text('[jwt.signing]\nkey = "exact"\n')
    assert loader(tmp_path, BOTH_KEYS, security_file=str(exact)).load() == SecurityConfig(jwt_write_key=b"exact")


@pytest.mark.parametrize("text", [None, "[broken"])
def test_security_file_must_be_readable(tmp_path: Path, text: str | None) -> None:
    exact = tmp_path / "exact.toml"
    if text is not None:
        exact.write_text(text)
    assert refusal(tmp_path, "", security_file=str(exact)).startswith(f"-securityFile {exact}: ")


# --- white list (S2) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "entries"),
    [
        ((), None, ()),
        ((), "", ()),
        ((), [], ()),
        (("1.2.3.4",), "", ("1.2.3.4",)),
        ((), "10.0.0.1, 127.0.0.1", ("10.0.0.1", "127.0.0.1")),
        ((), ["10.0.0.1", " 10.2.0.0/16 "], ("10.0.0.1", "10.2.0.0/16")),
        ((), ["10.0.0.1,10.0.0.2"], ("10.0.0.1", "10.0.0.2")),
        ((), "10.0.0.1,,", ("10.0.0.1",)),
        ((), "10.1.2.3/8", ("10.1.2.3/8",)),
        ((), "::0001,fe80::/10", ("::1", "fe80::/10")),
        ((), "::ffff:10.0.0.1", ("10.0.0.1",)),
        (("1.1.1.1", " 2.2.2.2"), "3.3.3.3", ("1.1.1.1", "2.2.2.2", "3.3.3.3")),
    ],
)
def test_white_lists(flag: tuple[str, ...], value: object, entries: tuple[str, ...]) -> None:
    assert white_list(flag, settings({} if value is None else {"guard": {"white_list": value}})) == entries


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ((), "bad/99", "invalid CIDR address: bad/99"),
        ((), "10.0.0.0/33", "invalid CIDR address: 10.0.0.0/33"),
        ((), "10.0.0.0/255.0.0.0", "invalid CIDR address"),
        ((), "localhost", "invalid IP address: localhost"),
        ((), "10.0.0.1 10.0.0.2", "invalid IP address"),
        ((), "010.0.0.1", "invalid IP address"),
        ((), ",", "holds no address"),
        ((), " ", "holds no address"),
        ((), [""], "holds no address"),
        ((), [1], "must be a text or a list of texts"),
        ((), 5, "must be a text or a list of texts"),
        (("",), None, "-whiteList holds no address"),
        (("nosuch",), None, "-whiteList: invalid IP address: nosuch"),
    ],
)
def test_white_lists_that_would_let_everyone_in(flag: tuple[str, ...], value: object, words: str) -> None:
    with pytest.raises(SecurityError) as caught:
        white_list(flag, settings({} if value is None else {"guard": {"white_list": value}}))
    assert words in str(caught.value)
    if value is not None:
        assert "guard.white_list in f.toml" in str(caught.value)


def test_bad_white_list_stops_the_start(tmp_path: Path) -> None:
    text = refusal(tmp_path, '[guard]\nwhite_list = "10.0.0.1,bad/99"\n')
    assert text.startswith(f"guard.white_list in {tmp_path}/conf/security.toml: invalid CIDR address: bad/99")


# --- TLS (S1) --------------------------------------------------------------------------------------------------------


HTTPS = '[https.volume]\ncert = "c"\nkey = "k"\n'
GRPC = '[grpc]\nca = "a"\n[grpc.volume]\ncert = "c"\nkey = "k"\n'


@pytest.mark.parametrize(
    ("toml", "key", "reason"),
    [
        # operations.md 3.4: upstream serves these in plain text
        ('[https.volume]\ncert = "c"\n', "https.volume.cert", "asks for TLS, but https.volume.key is not set"),
        ('[https.volume]\nkey = "k"\n', "https.volume.key", "asks for TLS, but https.volume.cert is not set"),
        ('[https.volume]\nca = "a"\n', "https.volume.ca", "https.volume.cert and https.volume.key are not set"),
        ('[https.volume]\ncert = ["c"]\n', "https.volume.cert", "must be a text"),
        ('[https.volume.cert]\nfile = "c"\n', "https.volume.cert", "must be a text"),
        # 3.5: these too
        ('[grpc.volume]\ncert = "c"\n', "grpc.volume.cert", "grpc.volume.key and grpc.ca are not set"),
        ('[grpc.volume]\nkey = "c"\n', "grpc.volume.key", "grpc.volume.cert and grpc.ca are not set"),
        ('[grpc.volume]\ncert = "c"\nkey = "k"\n', "grpc.volume.cert", "asks for TLS, but grpc.ca is not set"),
        ('[grpc.volume]\nclient_cert = "c"\n', "grpc.volume.client_cert", "are not set"),
        ('[grpc]\nca = "c"\n', "grpc.ca", "grpc.volume.cert and grpc.volume.key are not set"),
        ('[grpc.volume]\nallowed_commonNames = "c"\n', "grpc.volume.allowed_commonnames", "are not set"),
        ('[grpc]\nallowed_wildcard_domain = "c"\n', "grpc.allowed_wildcard_domain", "are not set"),
        # [tls]: upstream stops, ignores it, or serves gRPC in plain text
        (HTTPS + '[tls]\nmin_version = "TLSv1.2"\n', "tls.min_version", "invalid tls version TLSv1.2"),
        (HTTPS + '[tls]\nmax_version = "1.3"\n', "tls.max_version", "invalid tls version 1.3"),
        (HTTPS + '[tls]\ncipher_suites = "NOPE"\n', "tls.cipher_suites", "invalid tls cipher suite name NOPE"),
        (GRPC + '[tls]\nmin_version = "bogus"\n', "tls.min_version", "invalid tls version bogus"),
        (GRPC + '[tls]\ncipher_suites = "A,B"\n', "tls.cipher_suites", "invalid tls cipher suite name A"),
        (GRPC + '[tls]\nmax_version = "TLS 1.2"\n', "tls.max_version", "gRPC cannot be kept from TLS 1.3"),
        (HTTPS + '[tls]\nmax_version = "TLS 1.1"\n', "tls.max_version", "leaves nothing"),
        (
            HTTPS + '[tls]\nmax_version = "TLS 1.2"\nmin_version = "TLS 1.3"\n',
            "tls.max_version",
            "is below tls.min_version",
        ),
        (
            HTTPS + '[tls]\nmax_version = "TLS 1.2"\ncipher_suites = "TLS_AES_128_GCM_SHA256"\n',
            "tls.cipher_suites",
            "names suites of TLS 1.3 only",
        ),
        # outgoing: upstream stops as well
        (
            '[https.client]\nenabled = true\ncert = "/x"\n',
            "https.client.cert",
            'https.client: both cert and key must be set (got cert="/x" key="")',
        ),
        ('[https.client]\nenabled = true\nkey = "/x"\n', "https.client.key", "both cert and key must be set"),
    ],
)
def test_tls_that_cannot_be_is_refused(tmp_path: Path, toml: str, key: str, reason: str) -> None:
    text = refusal(tmp_path, toml)
    assert text.startswith(f"{key} in ")
    assert reason in text
    assert "security.toml" in text or ".cert]" in toml, "a table has no place of its own"


@pytest.mark.parametrize(
    ("toml", "https", "grpc", "client"),
    [
        (HTTPS, True, False, False),
        (HTTPS + 'ca = "a"\n', True, False, False),
        (GRPC, False, True, False),
        (GRPC + 'client_cert = "x"\n', False, True, False),
        (GRPC + 'allowed_commonNames = "a,b"\n', False, True, False),
        ("[https.client]\nenabled = true\n", False, False, True),
        ('[https.client]\nenabled = true\ncert = "c"\nkey = "k"\n', False, False, True),
        ('[https.client]\ncert = "c"\n', False, False, False),
        ('[tls]\nmin_version = "bogus"\n', False, False, False),
        (HTTPS + '[tls]\nmax_version = "TLS 1.2"\nmin_version = "TLS 1.0"\n', True, False, False),
    ],
)
def test_tls_that_is_asked_for(tmp_path: Path, toml: str, https: bool, grpc: bool, client: bool) -> None:
    tls = loader(tmp_path, toml).load().tls
    assert (tls.serves_https, tls.uses_grpc_tls, tls.client_enabled) == (https, grpc, client)


def test_tls_by_environment(tmp_path: Path) -> None:
    assert loader(tmp_path, "", {"WEED_HTTPS_CLIENT_ENABLED": "true"}).load().tls.client_enabled
    (tmp_path / "conf" / "security.toml").unlink()
    text = refusal(tmp_path, "", {"WEED_GRPC_CA": "/ca"})
    assert text.startswith("grpc.ca in environment variable WEED_GRPC_CA asks for TLS")


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 18000.0), ("90s", 90.0), ("5", 18000.0), ("0", 18000.0), ("-1h", 18000.0)]
)
def test_interval_of_looking_at_certificates(tmp_path: Path, text: str, seconds: float) -> None:
    environ = {"WEED_TLS_CERT_REFRESH_INTERVAL": text}
    assert loader(tmp_path, HTTPS, environ).load().tls.refresh_s == seconds


def test_empty_tls_keys_and_those_of_other_servers_do_no_harm(tmp_path: Path) -> None:
    toml = (
        '[grpc]\nca = ""\n[grpc.volume]\ncert = ""\nkey = ""\n[grpc.master]\ncert = "m"\n'
        "[https.client]\nenabled = false\n"
        '[https.volume]\ncert = ""\n[https.master]\ncert = "m"\n[tls]\nmin_version = "TLS 1.2"\n'
    )
    assert loader(tmp_path, toml).load().tls.min_version == "TLS 1.2"


# --- reload (2.4) ----------------------------------------------------------------------------------------------------


def test_reload_takes_keys_and_white_list(tmp_path: Path) -> None:
    made = loader(tmp_path, BOTH_KEYS + '[guard]\nwhite_list = "1.1.1.1"\n', white_list=("9.9.9.9",))
    first = made.load()
    (tmp_path / "conf" / "security.toml").write_text('[jwt.signing]\nkey = "new"\n[guard]\nwhite_list = "2.2.2.2"\n')
    second = made.reload(first)
    assert second.jwt_write_key == b"new"
    assert second.jwt_read_key == b"r", "a key that left the file keeps its value"
    assert second.white_list == ("9.9.9.9", "2.2.2.2")
    (tmp_path / "conf" / "security.toml").write_text('[jwt.signing.read]\nkey = ""\n')
    assert made.reload(second).jwt_read_key == b""


def test_reload_leaves_ui_and_tls_alone(tmp_path: Path) -> None:
    made = loader(tmp_path, "[access]\nui = true\n")
    first = made.load()
    (tmp_path / "conf" / "security.toml").write_text('[access]\nui = false\n[https.volume]\ncert = "c"\n')
    second = made.reload(first)
    assert second.ui_access is True and second.tls == first.tls


def test_reload_with_a_bad_white_list_is_refused(tmp_path: Path) -> None:
    made = loader(tmp_path, '[guard]\nwhite_list = "1.1.1.1"\n')
    first = made.load()
    (tmp_path / "conf" / "security.toml").write_text('[guard]\nwhite_list = "nonsense"\n')
    with pytest.raises(SecurityError):
        made.reload(first)


def test_nothing_of_a_refused_file_came_back_with_the_next_one(tmp_path: Path) -> None:
    made = loader(tmp_path, BOTH_KEYS)
    first = made.load()
    (tmp_path / "conf" / "security.toml").write_text('[jwt.signing]\nkey = "x"\n[guard]\nwhite_list = "nonsense"\n')
    with pytest.raises(SecurityError):
        made.reload(first)
    (tmp_path / "conf" / "security.toml").write_text('[jwt.signing.read]\nkey = "new"\n')
    second = made.reload(first)
    assert (second.jwt_write_key, second.jwt_read_key, second.white_list) == (b"w", b"new", ())


# --- volume.toml (2.3) -----------------------------------------------------------------------------------------------


def test_disk_probe_defaults() -> None:
    assert disk_probe(Settings({}), "") == DiskProbeConfig()


@pytest.mark.parametrize(
    ("disk", "latency"), [("", 0.5), ("hdd", 0.5), ("ssd", 0.1), ("nvme", 0.05), ("ssd,ssd", 0.5), ("tag", 0.5)]
)
def test_disk_probe_threshold_by_disk(disk: str, latency: float) -> None:
    assert disk_probe(Settings({}), disk).slow_latency_s == latency


def test_disk_probe_keys(tmp_path: Path) -> None:
    (tmp_path / "conf" / "volume.toml").write_text(
        '[volume.disk.io]\nprobe = true\ntimeout = "3s"\ninterval = "30s"\nwindow = "5m"\n'
        "[volume.disk.io.slow]\npercent = 25.5\n[volume.disk.io.slow.latency]\nssd = '70ms'\n"
        "[volume.disk.io.error]\npercent = 5\n[volume.disk.io.min]\nsamples = 4\n"
        "[volume.disk.io.max.stat]\nfailures = 9\n[volume.disk.io.recovery]\ncoef = 0.25\n"
    )
    got = loader(tmp_path, disk_setting="ssd").load_disk_probe()
    assert got == DiskProbeConfig(True, 3.0, 30.0, 0.07, 300.0, 4, 25.5, 5.0, 9, 0.25)


def test_disk_probe_by_environment(tmp_path: Path) -> None:
    assert loader(tmp_path, None, {"WEED_VOLUME_DISK_IO_PROBE": "true"}).load_disk_probe().enabled
