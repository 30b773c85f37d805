"""What is in an image, as CycloneDX 1.6: `docker run --rm -i --entrypoint python IMAGE - < deploy/sbom.py`.

Runs inside of it and needs nothing but Python: it lists the distributions that this Python can import, and
the Debian packages under it. The same image gives the same bytes.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG_STATUS = Path("/var/lib/dpkg/status")
OS_RELEASE = Path("/etc/os-release")


def python_component(found: Distribution) -> dict[str, Any]:
    """One distribution. Its licence is what it says itself: an SPDX expression, or whatever words it has."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    purl = f"pkg:pypi/{name}@{quote(found.version)}"
    component = {"type": "library", "bom-ref": purl, "name": name, "version": found.version, "purl": purl}
    if expression := found.metadata["License-Expression"]:
        component["licenses"] = [{"expression": expression}]
    elif (words := found.metadata["License"] or "") and "\n" not in words:  # else it is the whole text
        component["licenses"] = [{"license": {"name": words}}]
    return component


def debian_components(status: str, distribution: str) -> Iterator[dict[str, Any]]:
    """Installed packages of `/var/lib/dpkg/status`."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            version, architecture = fields["Version"], fields["Architecture"]
            at = f"{fields['Package']}@{quote(version, safe='')}?arch={architecture}&distro={distribution}"
            purl = f"pkg:deb/debian/{at}"
            yield {
                "type": "library",
                "bom-ref": purl,
                "name": fields["Package"],
                "version": version,
                "purl": purl,
            }


def bill() -> dict[str, Any]:
    """The whole of it."""
    release = OS_RELEASE.read_text(encoding="utf-8") if OS_RELEASE.exists() else ""
    system = {name: value.strip('"') for name, value in re.findall(r"^(\w+)=(.*)$", release, re.MULTILINE)}
    status = DPKG_STATUS.read_text(encoding="utf-8") if DPKG_STATUS.exists() else ""
    distribution = f"{system.get('ID', 'linux')}-{system.get('VERSION_ID', '')}"
    components = [python_component(found) for found in distributions()]
    components += debian_components(status, distribution)
    components += [
        {"type": "platform", "bom-ref": "python", "name": "python", "version": platform.python_version()},
        {
            "type": "operating-system",
            "bom-ref": "os",
            "name": system.get("ID", "linux"),
            "version": system.get("VERSION_ID", ""),
        },
    ]
    unique = {component["bom-ref"]: component for component in components}  # two paths may show one
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [unique[ref] for ref in sorted(unique)],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
    sys.stdout.write("\n")
