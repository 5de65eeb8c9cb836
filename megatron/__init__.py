# Lets NVIDIA's `megatron-core`, which ships `megatron/core` without an `__init__.py`, be installed beside us.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)
