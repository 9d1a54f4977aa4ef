# PostgreSQL of the evaluation profile: made on the first start, whole or not at all.
set -eu
PATH="$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')"
etc=${ETC:-/etc/postgresql}
data=${DATA:-/var/lib/postgresql/data/pgdata}
if [ ! -e "$data" ]; then
  rm -rf "$data.new"
  initdb --pgdata="$data.new" --username=postgres --pwfile="$etc/password/superuser" \
    --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8
  mv "$data.new" "$data"
fi
exec postgres -D "$data" \
  -c listen_addresses='*' -c unix_socket_directories=/tmp \
  -c hba_file="$etc/config/access.conf" \
  -c ssl=on -c ssl_cert_file="$etc/tls/tls.crt" -c ssl_key_file="$etc/tls/tls.key"
