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
    torch_streams: bool

class LaunchPlan(TypedDict):
    regime: str
    vector: int
    items: int
    threads: int
    team: int
    tx: int
    ty: int
    groups: int
    tiles: int
    rows_per_part: int
    columns_per_part: int
    parts: int

def launch_plan(
    height: int, width: int, dtype: str, channels: int = 0, aligned: bool = True, moments: bool = False
) -> LaunchPlan: ...
def build_info() -> BuildInfo: ...
