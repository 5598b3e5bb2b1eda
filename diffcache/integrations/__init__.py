"""Where diffcache meets other libraries; each file imports its library only when it is used."""
