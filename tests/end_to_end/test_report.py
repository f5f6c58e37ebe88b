"""``kurtail-gguf convert --report`` of a tiny model: the page of a real file, and the same file without it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra eval)")


@pytest.fixture(scope="module")
def converted(cli, tiny_spm, text, tmp_path_factory):
    """Directory of a file, its page, and the same conversion's file without a page."""
    directory = tmp_path_factory.mktemp("report")
    options = ("--rotation", "hadamard", "--calibration", text, "--calibration-tokens", "1024")
    for name, more in (("plain", ()), ("told", ("--report", directory / "told.html"))):
        done = cli("convert", tiny_spm, directory / f"{name}.gguf", *options, *more)
        assert done.status == 0, done.stderr
    assert f"wrote {directory / 'told.html'}" in done.stdout
    return directory


def test_the_file_is_the_same(converted):
    assert (converted / "plain.gguf").read_bytes() == (converted / "told.gguf").read_bytes()
    assert sorted(path.name for path in converted.iterdir()) == ["plain.gguf", "told.gguf", "told.html"]


def test_the_page_tells_what_inspect_does(converted, cli):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed (extra test)")
    page = (converted / "told.html").read_text(encoding="utf-8")
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    rows = {row[0].text: "".join(row[1].itertext()) for row in tree.findall(".//table[@id='identity']//tr")}
    told = json.loads(cli("inspect", converted / "told.gguf", "--json").stdout)
    assert rows["bits per weight"].startswith(f"{told['bits_per_weight']:.2f}, {told['block_bits_per_weight']:.2f} in")
    assert rows["file"].startswith(f"{(converted / 'told.gguf').stat().st_size:,} bytes")
    assert told["kurtail"]["calibration_sha256"] in rows["calibration"] and "--report" in rows["made by"]
    stages = [row[0].text for row in tree.findall(".//table[@id='stages']//tr")[1:]]
    assert stages == ["source", "calibration", "rotations", "cache", "quantize", "measure for the report", "export"]
    assert page.count("<svg") == 3
