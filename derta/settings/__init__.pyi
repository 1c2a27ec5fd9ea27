from derta.settings.building import build as build, shared as shared
from derta.settings.fields import (
    Key as Key,
    check_ranges as check_ranges,
    keys_of as keys_of,
    setting as setting,
)
from derta.settings.help import describe_keys as describe_keys
from derta.settings.reading import (
    Text as Text,
    read_options as read_options,
    read_text as read_text,
    read_yaml as read_yaml,
)
from derta.settings.schema import json_schema as json_schema
