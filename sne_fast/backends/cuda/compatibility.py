"""Compatibility of a build of the CUDA backend with a GPU and its driver."""

from __future__ import annotations

import re
from collections.abc import Sequence

Capability = tuple[int, int]
MINIMUM: Capability = (8, 0)


def _parts(architecture: str) -> tuple[Capability, str, bool, bool]:
    """Return capability, suffix ("a", "f" or ""), whether there is machine code, whether there is PTX."""
    match = re.fullmatch(r"(compute_)?(\d+)(\d)([af]?)(\+ptx)?", architecture)
    if match is None:
        raise ValueError(f"{architecture!r} is no architecture of a build")
    virtual = bool(match[1])
    return (int(match[2]), int(match[3])), match[4], not virtual, virtual or bool(match[5])


def has_machine_code(architecture: str, capability: Capability) -> bool:
    """Return whether the machine code of an architecture runs on a GPU.

    A cubin runs on later minor versions of its generation, with the suffix "f" too; with "a" on its own version only.
    """
    built, suffix, machine_code, _ = _parts(architecture)
    if suffix == "a":
        return machine_code and built == capability
    return machine_code and built[0] == capability[0] and built[1] <= capability[1]


def has_ptx(architecture: str, capability: Capability) -> bool:
    """Return whether the driver can compile the PTX of an architecture for a GPU.

    It compiles PTX for everything newer, unless the code uses features of one version ("a") or family ("f").
    """
    built, suffix, _, ptx = _parts(architecture)
    if suffix == "a":
        return ptx and built == capability
    if suffix == "f":
        return ptx and built[0] == capability[0] and built[1] <= capability[1]
    return ptx and built <= capability


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def device_reasons(
    name: str, capability: Capability, architectures: Sequence[str], driver: int, runtime: int
) -> list[str]:
    """Return why a build cannot run on a device; empty if it can.

    Args:
        name: of the device, for the message.
        capability: compute capability of the device.
        architectures: architectures of the build, such as ``["80+ptx", "90a", "100"]``.
        driver: newest CUDA that the driver knows, as cudaDriverGetVersion gives it (13000 for 13.0); 0 if unknown.
        runtime: CUDA that the build was made with.
    """
    here = f"{name} has {capability[0]}.{capability[1]}"
    if capability < MINIMUM:
        return [f"needs a GPU of compute capability 8.0 or more, {here}"]
    if driver and driver // 1000 < runtime // 1000:
        return [
            f"was built with CUDA {_text(runtime)}, the driver knows CUDA {_text(driver)} at most: update the driver, "
            "or reinstall with an older toolkit"
        ]
    if any(has_machine_code(architecture, capability) for architecture in architectures):
        return []
    number = f"{10 * capability[0] + capability[1]}"
    own = {"90": "90a", "103": "100"}.get(number, number)  # 90a: with the instructions that Hopper alone has
    remedy = f"reinstall with SNE_FAST_BUILD=cuda SNE_FAST_CUDA_ARCHS={own}"
    built = f"was compiled for {' '.join(architectures)}"
    if not any(has_ptx(architecture, capability) for architecture in architectures):
        return [f"{built}, {here}: {remedy}"]
    if driver and driver < runtime:  # a driver's compiler takes no PTX of a later toolkit
        return [
            f"{built}, {here}, and a driver of CUDA {_text(driver)} does not compile what CUDA {_text(runtime)} made: "
            f"update the driver, or {remedy}"
        ]
    return []
