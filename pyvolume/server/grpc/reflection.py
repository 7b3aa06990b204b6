"""Server reflection in both spellings, `grpc.reflection.v1` and `v1alpha`.

Must not import the handlers. grpcio-reflection brings the messages of v1alpha only; version 1 has the same fields under
another package name, so its file is derived from that one and both are answered by the same code and the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2

ALPHA_PACKAGE = "grpc.reflection.v1alpha"
V1_PACKAGE = "grpc.reflection.v1"
SERVICE_NAMES = (f"{V1_PACKAGE}.ServerReflection", f"{ALPHA_PACKAGE}.ServerReflection")
METHOD = "ServerReflectionInfo"

Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse


@cache
def v1_file() -> Any:
    """The descriptor of grpc/reflection/v1/reflection.proto, added to the default pool on first use."""
    proto = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(proto)
    proto.name = "grpc/reflection/v1/reflection.proto"
    proto.package = V1_PACKAGE
    old, new = f".{ALPHA_PACKAGE}.", f".{V1_PACKAGE}."
    for message in proto.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, new)
    for service in proto.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new)
            method.output_type = method.output_type.replace(old, new)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(proto.SerializeToString())
    return pool.FindFileByName(proto.name)


class Reflection:
    """Answers requests about the services named at construction and all that the process's descriptors hold."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = sorted([*service_names, *SERVICE_NAMES])
        self._pool = v1_file().pool

    def serve(self, requests: Iterator[Any]) -> Iterator[Any]:
        """The stream: one answer for each request, in order."""
        for request in requests:
            yield self.answer(request)

    def answer(self, request: Any) -> Any:
        """The answer to one request. What is not found is an error inside the answer, as the protocol has it."""
        kind = request.WhichOneof("message_request")
        try:
            match kind:
                case "list_services":
                    services = [reflection_pb2.ServiceResponse(name=name) for name in self._names]
                    listed = reflection_pb2.ListServiceResponse(service=services)
                    return Response(list_services_response=listed, original_request=request)
                case "file_by_filename":
                    return _with_files(self._pool.FindFileByName(request.file_by_filename), request)
                case "file_containing_symbol":
                    return _with_files(self._pool.FindFileContainingSymbol(request.file_containing_symbol), request)
                case "file_containing_extension":
                    wanted = request.file_containing_extension
                    extended = self._pool.FindMessageTypeByName(wanted.containing_type)
                    extension = self._pool.FindExtensionByNumber(extended, wanted.extension_number)
                    return _with_files(extension.file, request)
                case "all_extension_numbers_of_type":
                    extended = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                    numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(extended))
                    found = reflection_pb2.ExtensionNumberResponse(
                        base_type_name=extended.full_name, extension_number=numbers
                    )
                    return Response(all_extension_numbers_response=found, original_request=request)
                case _:
                    return _error(grpc.StatusCode.INVALID_ARGUMENT, "invalid MessageRequest", request)
        except KeyError:
            return _error(grpc.StatusCode.NOT_FOUND, f"{kind} not found", request)


def _error(code: grpc.StatusCode, text: str, request: Any) -> Any:
    error = reflection_pb2.ErrorResponse(error_code=code.value[0], error_message=text)
    return Response(error_response=error, original_request=request)


def _with_files(file: Any, request: Any) -> Any:
    """The file and everything it imports, each once, the file itself first."""
    found: dict[str, Any] = {}
    waiting = [file]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.name not in found:
            found[descriptor.name] = descriptor
            waiting.extend(descriptor.dependencies)
    raw = [descriptor.serialized_pb for descriptor in found.values()]
    return Response(
        file_descriptor_response=reflection_pb2.FileDescriptorResponse(file_descriptor_proto=raw),
        original_request=request,
    )
