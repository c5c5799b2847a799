"""The libraries of the chat page, fetched from the npm registry that npm is configured to use.

    python -m tools.vendor_page

It downloads the versions below, compares each package with the sha512 that the registry gives for
it (and with the recorded one, if the version has not changed), and writes the files of the page,
the licences beside them, and `versions.json`, with the hash of every file. To move to a newer
version, change it here, run this, and run `pytest tests/serve/page`.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

__all__ = ["VENDOR"]

VENDOR = Path(__file__).parent.parent / "dots1_local" / "serve" / "page" / "vendor"
_LANGUAGES = (
    "bash", "c", "cpp", "css", "diff", "go", "ini", "java", "javascript", "json", "markdown",
    "python", "rust", "sql", "typescript", "xml", "yaml",
)  # fmt: skip
_MAX_PACKAGE = 64 << 20  # bytes


@dataclass(frozen=True)
class Package:
    """A package, its version, and its files that the page uses, by their names on the page."""

    name: str
    version: str
    license: str
    files: Mapping[str, str]


_PACKAGES = (
    Package(
        "marked",
        "18.2.1",
        "MIT",
        {"marked.js": "lib/marked.esm.js", "marked.LICENSE.txt": "LICENSE"},
    ),
    Package(
        "dompurify",
        "3.5.0",
        "Apache-2.0",
        {"purify.js": "dist/purify.min.js", "purify.LICENSE.txt": "LICENSE"},
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        {
            "highlight.js": "es/core.min.js",
            "highlight.LICENSE.txt": "LICENSE",
            **{f"languages/{name}.js": f"es/languages/{name}.min.js" for name in _LANGUAGES},
        },
    ),
)


def main() -> None:
    """Write the folder `vendor` anew."""
    recorded = _recorded()
    fetched = {package.name: _fetch(package, recorded) for package in _PACKAGES}
    shutil.rmtree(VENDOR, ignore_errors=True)
    entries = [_write(package, *fetched[package.name]) for package in _PACKAGES]
    text = json.dumps({"packages": entries}, indent=2) + "\n"
    (VENDOR / "versions.json").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in VENDOR.rglob("*.js"))
    print(f"{VENDOR}: {size / 1000:.0f} kB of JavaScript")


def _recorded() -> dict[tuple[str, str], str]:
    """Return the hashes of the packages that were fetched before, by name and version."""
    path = VENDOR / "versions.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["packages"]
    return {(each["name"], each["version"]): each["integrity"] for each in entries}


def _fetch(package: Package, recorded: Mapping[tuple[str, str], str]) -> tuple[str, bytes]:
    """Return the registry's hash of a package, and the package, which has this hash."""
    asked = ["npm", "config", "get", "registry"]
    registry = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    about = httpx2.get(f"{registry.rstrip('/')}/{package.name}/{package.version}", timeout=60)
    dist = about.raise_for_status().json()["dist"]
    integrity = str(dist["integrity"])
    if recorded.get((package.name, package.version), integrity) != integrity:
        raise SystemExit(f"the registry has another {package.name} {package.version} than before")
    data = httpx2.get(dist["tarball"], timeout=60, follow_redirects=True).raise_for_status().content
    if integrity != "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode():
        raise SystemExit(f"{package.name} {package.version} is not what the registry describes")
    return integrity, data


def _write(package: Package, integrity: str, data: bytes) -> dict[str, Any]:
    """Write the files of a package; return its entry in `versions.json`."""
    hashes = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for target, source in sorted(package.files.items()):
            member = archive.extractfile(f"package/{source}")
            if member is None:
                raise SystemExit(f"{package.name} {package.version} has no {source}")
            content = member.read(_MAX_PACKAGE)
            path = VENDOR / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            hashes[target] = hashlib.sha256(content).hexdigest()
    return {
        "name": package.name,
        "version": package.version,
        "license": package.license,
        "integrity": integrity,
        "sha256": hashes,
    }


if __name__ == "__main__":
    main()
