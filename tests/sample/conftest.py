pytest_plugins = ["pyskl.pytest_plugin"]
