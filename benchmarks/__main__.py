"""`python -m benchmarks`: prints the tables and the machine they were measured on."""

import os
import platform

import jax

from benchmarks import loss

if __name__ == "__main__":
  device = jax.devices()[0]
  print(
    f"{device.device_kind} ({device.platform}), {os.cpu_count()} cores, "
    f"Python {platform.python_version()}, jax {jax.__version__}\n"
  )
  print(loss.main())
