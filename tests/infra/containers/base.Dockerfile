# Debian in place of Ray's image: the same user, the same version of Ray and of Python. base.tar is
# made by debootstrap. pip finds its wheels by the /etc/pip.conf that is mounted while it is built.
FROM scratch
ADD base.tar /
ENV TZ=America/Los_Angeles HOME=/home/ray PATH=/home/ray/venv/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN useradd --uid 1000 --gid 100 --create-home ray
USER 1000:100
WORKDIR /home/ray
ARG RAY_VERSION
RUN python3 -m venv venv && pip install --no-cache-dir "ray[data,default]==${RAY_VERSION}"
