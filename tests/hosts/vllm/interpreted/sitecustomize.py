"""Lets vLLM's second model runner, whose kernels are Triton's, run on CPU: they are interpreted. Put on PYTHONPATH by the tests."""

import os

if os.environ.get("TEST_TRITON_ON_CPU") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.backends as backends

    class Driver:
        """What is asked of a driver."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_target(self):  # type: ignore[no-untyped-def]
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 0)

        def get_current_stream(self, *args) -> int:  # type: ignore[no-untyped-def]
            return 0

        def set_current_device(self, *args) -> None:  # type: ignore[no-untyped-def]
            pass

        def get_device_interface(self):  # type: ignore[no-untyped-def]
            return torch.cpu

    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
