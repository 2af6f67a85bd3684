"""Tests of vLLM run only where they are asked for by name: `pytest -m vllm`."""


def pytest_collection_modifyitems(config, items):
    if "vllm" in config.getoption("markexpr"):
        return
    deselected = [item for item in items if item.get_closest_marker("vllm")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
