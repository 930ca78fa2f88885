from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(key):
    "settings.ini lists requirements separated by blanks."
    return [r for r in cfg.get(key, "").split() if r]


setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0 AND MIT AND CC-BY-4.0",  # code and weights; some of the emoji have the others
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    license_files=["LICENSE", "NOTICE"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    packages=[cfg["lib_name"]],
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require={"dev": requirements("dev_requirements")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
