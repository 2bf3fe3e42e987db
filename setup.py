"Package metadata: read from settings.ini, which nbdev shares."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
course = cfg['course_requirements'].split()   # what the notebooks import beside the library
parquet = cfg['parquet_requirements'].split()   # what reads rows of Hugging Face
classroom = cfg['class_requirements'].split()   # what an instructor needs to release and grade
hub = cfg['hub_requirements'].split()   # other people's networks

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=['Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    entry_points=dict(console_scripts=[cfg['console_scripts']]),
    extras_require={'course': course, 'class': classroom, 'parquet': parquet, 'hub': hub,
                    'dev': course + classroom + parquet + hub + cfg['dev_requirements'].split()},
)
