"""Run TensorRT engines and PyTorch modules at the cost of one CUDA graph launch, for every shape they keep seeing."""

from graphcache import debug as debug
from graphcache import observe as observe
from graphcache import runtime as runtime
from graphcache.buckets.advisor import Advice as Advice
from graphcache.buckets.advisor import advise_buckets as _advise
from graphcache.buckets.bucketed import Bucketed as _Bucketed
from graphcache.buckets.spec import Axis as Axis
from graphcache.buckets.spec import Buckets as Buckets
from graphcache.buckets.spec import Mask as Mask
from graphcache.cache.graph_cache import set_process_budget as set_process_budget
from graphcache.config import GraphConfig as GraphConfig
from graphcache.engines.build import build as build
from graphcache.engines.plugins import load_plugin_library as load_plugin_library
from graphcache.errors import Cause as Cause
from graphcache.errors import GraphCacheError as GraphCacheError
from graphcache.errors import Reason as Reason
from graphcache.events import Observer as Observer
from graphcache.export.compiling import compile as compile
from graphcache.export.op_kernel import unload_engines as unload_engines
from graphcache.export.op_schema import describe_engine as _describe_engine
from graphcache.features import features as _features
from graphcache.integrations.torch_tensorrt.adoption import Adoption as _Adoption
from graphcache.loops.loop import Loop as Loop
from graphcache.loops.loop import loop as loop
from graphcache.modules.cached_module import CachedModule as CachedModule
from graphcache.modules.engine import EngineModule as EngineModule
from graphcache.modules.explain import Explanation as Explanation
from graphcache.modules.explain import explain as explain
from graphcache.modules.prepare import Call as Call
from graphcache.modules.prepare import Prepared as Prepared
from graphcache.modules.session import Session as Session
from graphcache.modules.transparent import controls as controls
from graphcache.modules.wrapped import CacheInfo as CacheInfo
from graphcache.modules.wrapping import wrap as wrap
from graphcache.persist.loading import load as load
from graphcache.persist.manifest import Manifest as Manifest
from graphcache.persist.saving import save as _save
from graphcache.persist.served_calls import choose as _choose
from graphcache.persist.served_calls import served as _served
from graphcache.version import __version__ as __version__

_features.manifest_of = _served
_features.save = _save
_features.manifest_type = Manifest
_features.calls_of_manifest = _choose
_features.padding = _Bucketed
_features.advise_buckets = _advise
_features.graph_backend = CachedModule
_features.describe_engine = _describe_engine
_features.adopt = _Adoption
