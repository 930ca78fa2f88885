"From a caption to an image: the companion of a thesis on text-to-image diffusion."
__version__ = "0.1.0"

_PUBLIC = {  # name: module; imported when first used, so that `import t2i` costs nothing
    "TextToImage": "pipeline",
    "upsample": "pipeline",
    "CLIP": "clip",
    "Diffusion": "diffusion",
    "UNet": "unet",
    "Translator": "translator",
    "load_preset": "core",
    "load_emoji": "data",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC: raise AttributeError(f"module 't2i' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"t2i.{_PUBLIC[name]}"), name)


def __dir__(): return [*globals(), *_PUBLIC]


def command():
    "The shell's `t2i`, which can be stopped while its modules are still being imported."
    try:
        from t2i.cli import main
        main()
    except KeyboardInterrupt: raise SystemExit(130)
