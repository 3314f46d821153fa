"""The GPU suite: parity tests, the device's ceilings, then kernels, programs and whole requests against other ways."""
