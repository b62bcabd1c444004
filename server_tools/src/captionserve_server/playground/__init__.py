"""The playground: a web page that asks a service, or a model in this process, and shows why."""
