from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    cuda: bool
    cuda_architectures: str
    nvcc: str
    flags: str
    cpu_capability: str

def build_info() -> BuildInfo: ...
