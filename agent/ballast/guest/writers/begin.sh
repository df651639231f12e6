# sh begin.sh FILE PROGRAM [ARGUMENT...]: become PROGRAM; FILE says then that it was begun. No argument of sh, since
# systemd-run warns of a dollar among its own. As in qemu-ga and vmtoolsd a shell starts PROGRAM, for which a file
# without an interpreter line is a script too.
true >"$1"
shift
exec "$@"
