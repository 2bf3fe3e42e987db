"With FAKE_CUDA=1, `import torch` ends with `fake_cuda.install()`; a process that does without torch is left alone."
import os, sys

if os.environ.get('FAKE_CUDA', '0') not in ('', '0'):
    import importlib.abc, importlib.util

    class _AfterTorch(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != 'torch': return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec('torch')
            if spec is None: return None
            execute = spec.loader.exec_module
            def exec_module(module):
                execute(module)
                import fake_cuda
                fake_cuda.install()
            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, _AfterTorch())
