"""The markers of Hugging Face's tests."""

MARKERS = (
    "accelerate_tests", "bitsandbytes", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "order",
    "torch_compile_test", "torch_export_test",
)  # fmt: skip


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")
