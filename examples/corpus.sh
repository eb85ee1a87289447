#!/bin/sh
# The text that the bundled model learns: documentation, handbooks and dictionaries under free
# licences, from Debian's packages (bookworm), unpacked without being installed.
#
#     examples/corpus.sh ./corpus            # 143 MB to fetch
#     overleap train mini ./run --text ./corpus --text "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
#
# The licence of each package is in its usr/share/doc/*/copyright.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
packages="
    apache2-doc bash-doc debian-handbook debian-policy debian-reference-en developers-reference
    dict-foldoc dict-gcide dict-jargon git-doc libreoffice-help-en-us maxima-doc octave-doc perl-doc
    postgresql-doc-15 python-django-doc python-sqlalchemy-doc python-sympy-doc python3.11-doc
    r-doc-html sqlite3-doc vim-doc"
mkdir -p "$1"
cd "$1"
mkdir -p .fetched
(cd .fetched && apt-get download $packages)
for package in $packages; do
    rm -rf "$package"
    dpkg -x .fetched/"$package"_*.deb "$package"
done
rm -r .fetched
# One language of those that are translated, and no second copy of a page.
find debian-handbook/usr/share/doc/debian-handbook/html -mindepth 1 -maxdepth 1 ! -name en-US \
    -exec rm -r {} +
find apache2-doc -path '*/manual/*' -type d \( -name da -o -name de -o -name es -o -name fr \
    -o -name ja -o -name ko -o -name pt-br -o -name ru -o -name tr -o -name zh-cn \) -prune \
    -exec rm -r {} +
find python3.11-doc -type d -name _sources -exec rm -r {} +
du -sh .
